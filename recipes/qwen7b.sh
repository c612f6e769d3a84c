#!/usr/bin/env bash
# The paper's 7B run on one node of 8 x 80 GB: SFT, GRM, PPO with critique-post-edit, with its hyperparameters, which
# are the scripts' defaults (docs/method.md 1.3, 1.4, 1.6). The GRM runs in the processes that train. The memory plans
# of all stages come first; run it again to resume an interrupted run.
#
#   bash recipes/qwen7b.sh [PERSONAS QUESTIONS FLAGS ... | --judge URL]     # see recipes/plan_and_run.sh
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen7b.sh       # needs no GPU, and only config.json of the model
#
# MODEL: folder or hub id. DATA: rows of data/prepare.py and data/annotate.py. OUT: run folders.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
source recipes/plan_and_run.sh

MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen7b}
sft=(--model "$MODEL" --data "$DATA/pairs.jsonl" --out "$OUT/sft" --checkpoint-activations)
grm=(--model "$MODEL" --data "$DATA/judgements.jsonl" --out "$OUT/grm" --checkpoint-activations)
# 64 sequences at a time on each rank: all originals of a step
# Where critiques ask for what the policy's samples hardly ever have, add --edit-ratio none (docs/results.md)
cpe=(--prompts "$DATA/prompts_train.jsonl" --out "$OUT/cpe" --max-batch 64 --checkpoint-activations --offload)

plan sft.py "${sft[@]}"
[ -n "$JUDGE" ] || plan train_grm.py "${grm[@]}"
plan ppo_cpe.py --model "$MODEL" --judge "${JUDGE:-$MODEL}" "${cpe[@]}"
[ -z "${PLAN_ONLY:-}" ] || exit 0

make_rows
run sft.py "${sft[@]}"
[ -n "$JUDGE" ] || run train_grm.py "${grm[@]}"
run ppo_cpe.py --model "$OUT/sft/policy" --judge "${JUDGE:-$OUT/grm/model}" "${cpe[@]}"
