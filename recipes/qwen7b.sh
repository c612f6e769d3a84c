#!/usr/bin/env bash
# The paper's 7B run on one node of 8 x 80 GB: SFT, GRM, PPO with critique-post-edit, with its hyperparameters, which are the
# scripts' defaults (METHOD 1.3, 1.4, 1.6). The GRM answers in the processes that train. The memory plans of all stages come
# first; an interrupted run goes on where it was.
#
#   bash recipes/qwen7b.sh
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen7b.sh       # needs no GPU, and of the model its config.json alone
#
# MODEL: folder or hub id. DATA: rows of data/prepare.py and data/annotate.py. OUT: run folders.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
source recipes/plan_and_run.sh

MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen7b}
SFT="--model $MODEL --data $DATA/pairs.jsonl --out $OUT/sft --checkpoint-activations"
GRM="--model $MODEL --data $DATA/judgements.jsonl --out $OUT/grm --checkpoint-activations"
# 64 sequences a rank at once: all originals of a step
CPE="--prompts $DATA/prompts_train.jsonl --out $OUT/cpe --max-batch 64 --checkpoint-activations --offload"

plan sft.py $SFT
plan train_grm.py $GRM
plan ppo_cpe.py --policy "$MODEL" --judge "$MODEL" $CPE
[ -z "${PLAN_ONLY:-}" ] || exit 0

run sft.py $SFT
run train_grm.py $GRM
run ppo_cpe.py --policy "$OUT/sft/policy" --judge "$OUT/grm/model" $CPE
