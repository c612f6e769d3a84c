#!/usr/bin/env bash
# Every stage with Qwen2.5-0.5B on one GPU of 80 GB: a complete run to look at, with the paper's hyperparameters but 32
# prompts a step. GIB=24 plans for a smaller card.
#
#   bash recipes/qwen0.5b.sh [PERSONAS QUESTIONS FLAGS ... | --judge URL]     # see recipes/plan_and_run.sh
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen0.5b.sh     # needs no GPU, and only config.json of the model
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
GPUS=${GPUS:-1}
source recipes/plan_and_run.sh

MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen0.5b}
sft=(--model "$MODEL" --data "$DATA/pairs.jsonl" --out "$OUT/sft" --checkpoint-activations)
grm=(--model "$MODEL" --data "$DATA/judgements.jsonl" --out "$OUT/grm" --checkpoint-activations)
# Where critiques ask for what the policy's samples hardly ever have, add --edit-ratio none (docs/results.md)
cpe=(--prompts "$DATA/prompts_train.jsonl" --out "$OUT/cpe" --prompts-per-step 32 --mini-batch-prompts 16
    --checkpoint-activations)

plan sft.py "${sft[@]}"
[ -n "$JUDGE" ] || plan train_grm.py "${grm[@]}"
plan ppo_cpe.py --model "$MODEL" --judge "${JUDGE:-$MODEL}" "${cpe[@]}"
[ -z "${PLAN_ONLY:-}" ] || exit 0

make_rows
run sft.py "${sft[@]}"
[ -n "$JUDGE" ] || run train_grm.py "${grm[@]}"
run ppo_cpe.py --model "$OUT/sft/policy" --judge "${JUDGE:-$OUT/grm/model}" "${cpe[@]}"
