#!/usr/bin/env bash
# The whole pipeline on the generated world, on two CPU cores: base -> SFT -> GRM and BT -> PPO (BT), PPO (GRM), CPE ->
# evaluation by the exact judge. Ends in one table; everything is under OUT, and an interrupted run goes on where it was.
#
#   bash recipes/tiny.sh                             # 15 to 20 minutes
#   OUT=out/quick SCALE=0.05 bash recipes/tiny.sh    # does it run? Fewer steps; its table says nothing
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh

OUT=${OUT:-out/tiny}
SCALE=${SCALE:-1}
SEED=${SEED:-0}

WORLD=$OUT/world
scaled() { python -c "print(max($2, round($1 * $SCALE)))"; }  # steps of the full recipe, and at least
EVAL_PROMPTS=$(scaled 200 20)
stage() { printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"; }

stage "the generated world"
[ -f "$WORLD/judgements_eval.jsonl" ] || python data/persona_world.py --output "$WORLD" --seed "$SEED"

stage "base: from random weights, on answers, rewriting and judging of mixed quality"
python sft.py --from-scratch "$WORLD/tokenizer" --data "$WORLD/base_corpus.jsonl" --out "$OUT/base" --epochs 2 --layers 3 \
    --batch-size 64 --lr 3e-3 --warmup-ratio 0.05 --tokens-per-microbatch 8192 --max-steps "$(scaled 624 100)" --seed "$SEED"

stage "SFT: the chosen answers"
python sft.py --model "$OUT/base/policy" --data "$WORLD/pairs.jsonl" --out "$OUT/sft" --epochs 1 \
    --batch-size 64 --lr 3e-4 --tokens-per-microbatch 8192 --max-steps "$(scaled 62 2)" --seed "$SEED"

stage "GRM: critique and scores"
python train_grm.py --model "$OUT/base/policy" --data "$WORLD/judgements.jsonl" --out "$OUT/grm" --epochs 2 \
    --batch-size 64 --lr 1e-3 --tokens-per-microbatch 8192 --max-steps "$(scaled 186 40)" --seed "$SEED" \
    --eval-data "$WORLD/judgements_eval.jsonl" --eval-max-new-tokens 96

stage "BT: the Bradley-Terry baseline, on the pairs"
python train_grm.py --objective bt --model "$OUT/base/policy" --data "$WORLD/pairs.jsonl" --out "$OUT/bt" \
    --epochs 1 --batch-size 64 --lr 3e-4 --tokens-per-microbatch 8192 --max-steps "$(scaled 62 2)" --seed "$SEED" \
    --eval-data "$WORLD/pairs_eval.jsonl"

stage "gates: does the policy read profiles, does the GRM judge well?"  # a short run misses them, and goes on
python recipes/gates.py --world "$WORLD" --policy "$OUT/sft/policy" --grm "$OUT/grm/model" --out "$OUT/gates" || [ "$SCALE" != 1 ]

# n = 6 without edits against n = 4 and two edits of four: as many trained responses a prompt (METHOD 1.9)
RL="--policy $OUT/sft/policy --prompts $WORLD/prompts_train.jsonl --prompts-per-step 16
    --mini-batch-prompts 8 --max-response-length 96 --max-judgement-length 96 --temperature 1 --top-p 1 --lr 5e-5
    --critic-lr 2e-3 --tokens-per-microbatch 8192 --max-steps $(scaled 40 2) --seed $SEED"
stage "PPO, rewarded by BT"
python ppo_cpe.py $RL --judge "bt:$OUT/bt/model" --edit-rate 0 --n-samples 6 --out "$OUT/ppo_bt"
stage "PPO, rewarded by the GRM"
python ppo_cpe.py $RL --judge "$OUT/grm/model" --edit-rate 0 --n-samples 6 --out "$OUT/ppo_grm"
stage "PPO with critique-post-edit"
python ppo_cpe.py $RL --judge "$OUT/grm/model" --out "$OUT/cpe"

stage "evaluation: answers to new people's questions, scored by the exact judge, against those of SFT"
mkdir -p "$OUT/eval"
table=()
for run in "base=base" "SFT=sft" "PPO (BT)=ppo_bt" "PPO (GRM)=ppo_grm" "CPE=cpe"; do
    name=${run#*=}
    python evaluate.py --model "$OUT/$name/policy" --baseline "$OUT/sft/policy" --prompts "$WORLD/prompts_eval.jsonl" \
        --judge world --n-prompts "$EVAL_PROMPTS" --max-new-tokens 96 --temperature 1 --top-p 1 --seed "$SEED" \
        --out "$OUT/eval/$name" > "$OUT/eval/$name.log"
    table+=("${run%=*}=$OUT/eval/$name")
done
stage "done; $EVAL_PROMPTS questions"
python recipes/table.py --runs "${table[@]}" --edits-of "$OUT/cpe" | tee "$OUT/table.txt"
