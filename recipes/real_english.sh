#!/usr/bin/env bash
# Does a real model learn from edits what it never says? English questions, people with one concern each, and a rule
# judge whose critiques dictate what to add (recipes/real_english.py). How often the policy says it before RL is measured;
# one run has targets that are common, seldom and rare. It ends in a table over seeds. Run it again to go on.
#
#   bash recipes/real_english.sh CHECKPOINT                           # two CPU cores (no GPU is used), four hours
#   UNTIL=gate bash recipes/real_english.sh CHECKPOINT                # an hour: can this model learn to edit?
#   SEEDS=0 STEPS=4 PEOPLE=8 bash recipes/real_english.sh CHECKPOINT  # does it run? GATE=off goes on if it can't edit
#
# CHECKPOINT: folder or hub id of a small instruct model (Qwen2.5, Qwen3 or Llama format). Stages: the model's own answers;
# SFT on good ones and on rewrites that insert other things; samples of that policy, and the targets chosen by their
# rates; edits of that policy, as a gate; PPO beside CPE for each seed; answers to questions of other people.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
cores=$(nproc) # before jobs.sh sets OMP_NUM_THREADS, which nproc obeys
source recipes/jobs.sh

CHECKPOINT=${1:?usage: bash recipes/real_english.sh CHECKPOINT}
OUT=${OUT:-out/real_english}
DATA=$OUT/data
SEEDS=${SEEDS:-0 1 2}
STEPS=${STEPS:-40}
PEOPLE=${PEOPLE:-100}
stage() { printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"; }
alone() { OMP_NUM_THREADS=$cores "$@"; } # for a stage that no other runs beside
sample() { # sample MODEL ROWS ANSWERS N
    [ -f "$3" ] || python generate.py --model "$1" --input "$2" --output "$3" --n "$4" --temperature 0.8 \
        --max-new-tokens 64 --answer-template "$DATA/answer.txt" --dtype fp32
}

stage "the model's own answers"
made_with "$DATA" "PEOPLE=$PEOPLE CHECKPOINT=$CHECKPOINT"
[ -f "$DATA/questions.jsonl" ] || python recipes/real_english.py questions --people "$PEOPLE" --out "$DATA"
alone sample "$CHECKPOINT" "$DATA/questions.jsonl" "$DATA/answers.jsonl" 1

stage "SFT: good ones of them, and rewrites that insert other things"
[ -f "$DATA/sft.jsonl" ] || python recipes/real_english.py sft --answers "$DATA/answers.jsonl" --out "$DATA"
alone python sft.py --model "$CHECKPOINT" --data "$DATA/sft.jsonl" --out "$OUT/sft" --epochs 1 --batch-size 16 \
    --lr 1e-4 --answer-template "$DATA/answer.txt" --tokens-per-microbatch 2048 --dtype fp32 --save-every 20 \
    --keep-checkpoints 1

stage "what this policy says, and the targets"
alone sample "$OUT/sft/policy" "$DATA/questions.jsonl" "$DATA/samples.jsonl" 1
[ -f "$DATA/rates.json" ] || alone python recipes/real_english.py prompts --people "$PEOPLE" \
    --answers "$DATA/samples.jsonl" --model "$OUT/sft/policy" --out "$DATA"

rl=(--prompts "$DATA/prompts_train.jsonl" --judge recipes/real_english_judge.py:judge --model "$OUT/sft/policy"
    --answer-template "$DATA/answer.txt" --edit-template "$DATA/edit.txt" --prompts-per-step 8 --mini-batch-prompts 4
    --max-prompt-length 192 --max-new-tokens 64 --judge-max-new-tokens 48 --temperature 0.8 --top-p 1 --epochs 1000
    --tokens-per-microbatch 2048 --lr "${RL_LR:-3e-5}" --critic-lr "${CRITIC_LR:-1e-4}" --dtype fp32
    --save-every 10 --keep-checkpoints 1)

stage "gate: edits of this policy by the critiques that RL will have"
[ -f "$DATA/gate.json" ] ||
    alone python ppo_cpe.py "${rl[@]}" --edit-rate 1 --critic-warmup-steps 3 --max-steps 3 --out "$OUT/gate"
python recipes/real_english.py gate --answers "$OUT/gate" --out "$DATA" || [ "${GATE:-}" = off ]
rm -rf "$OUT/gate/checkpoints" # 4 GB; rollouts are read again
[ "${UNTIL:-}" != gate ] || exit 0

method() { # method NAME SEED FLAGS...
    local run=$OUT/$1$2
    python ppo_cpe.py "${rl[@]}" "${@:3}" --max-steps "$STEPS" --seed "$2" --out "$run"
    sample "$run/policy" "$DATA/prompts_dev.jsonl" "$run/answers_$STEPS.jsonl" 2
    cp "$run/answers_$STEPS.jsonl" "$run/answers.jsonl" # what the table reads
}
answers=()
for seed in $SEEDS; do
    stage "PPO beside CPE, seed $seed"
    marked PPO method ppo "$seed" --edit-rate 0 --n-samples 6 &
    marked CPE method cpe "$seed" --edit-loss "${EDIT_LOSS:-none}" --edit-below 4.9 &
    all_done
    answers+=("ppo=$OUT/ppo$seed" "cpe=$OUT/cpe$seed")
done

stage "the table"
alone sample "$OUT/sft/policy" "$DATA/prompts_dev.jsonl" "$OUT/sft_answers.jsonl" 2
alone python recipes/real_english.py table --answers "sft=$OUT/sft_answers.jsonl" "${answers[@]}" \
    --model "$CHECKPOINT" --rates "$DATA/rates.json" --out "$OUT"
