#!/usr/bin/env bash
# Every stage with Qwen2.5-0.5B on one GPU of 80 GB: a whole run to look at, with the paper's hyperparameters but 32 prompts a
# step. GIB=24 plans for a smaller card.
#
#   bash recipes/qwen0.5b.sh
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen0.5b.sh     # needs no GPU, and of the model its config.json alone
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
GPUS=${GPUS:-1}
source recipes/plan_and_run.sh

MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen0.5b}
SFT="--model $MODEL --data $DATA/pairs.jsonl --out $OUT/sft --checkpoint-activations"
GRM="--model $MODEL --data $DATA/judgements.jsonl --out $OUT/grm --checkpoint-activations"
CPE="--prompts $DATA/prompts_train.jsonl --out $OUT/cpe --prompts-per-step 32 --mini-batch-prompts 16
    --checkpoint-activations"

plan sft.py $SFT
plan train_grm.py $GRM
plan ppo_cpe.py --policy "$MODEL" --judge "$MODEL" $CPE
[ -z "${PLAN_ONLY:-}" ] || exit 0

run sft.py $SFT
run train_grm.py $GRM
run ppo_cpe.py --policy "$OUT/sft/policy" --judge "$OUT/grm/model" $CPE
