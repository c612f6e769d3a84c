# The flags of the runs in the generated world: recipes/tiny.sh sources this file, results/make/experiments.py reads it.
# One array per stage, plain words only (no quotes, variables or comments inside). Callers give paths, seeds and steps.
BASE_FLAGS=(--epochs 2 --layers 3 --batch-size 32 --lr 3e-3 --warmup-ratio 0.05 --tokens-per-microbatch 8192)
SFT_FLAGS=(--epochs 1 --batch-size 64 --lr 3e-4 --tokens-per-microbatch 8192)
GRM_FLAGS=(--epochs 2 --batch-size 32 --lr 1.5e-3 --tokens-per-microbatch 8192)
BT_FLAGS=(--epochs 1 --batch-size 64 --lr 3e-4 --tokens-per-microbatch 8192)
# the learning rate of the policy differs between methods, so callers give it
RL_FLAGS=(--prompts-per-step 16 --mini-batch-prompts 8 --max-new-tokens 96 --judge-max-new-tokens 96
    --temperature 1 --top-p 1 --critic-lr 2e-3 --tokens-per-microbatch 8192)
# PPO without edits, n = 6: as many trained responses per prompt as CPE's 4 answers and 2 edits (docs/method.md 1.9)
PPO_FLAGS=(--edit-rate 0 --n-samples 6)
EVALUATION_FLAGS=(--judge data/persona_world.py:judge --max-new-tokens 96 --temperature 1 --top-p 1)
