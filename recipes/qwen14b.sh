#!/usr/bin/env bash
# The paper's 14B run on one node of 8 x 80 GB, as recipes/qwen7b.sh, but the GRM answers from elsewhere in the last stage: the
# paper served it on two further GPUs. JUDGE is the URL of any OpenAI-compatible server that serves OUT/grm/model.
#
#   STAGES="sft grm" bash recipes/qwen14b.sh
#   STAGES=cpe JUDGE=http://OTHER_MACHINE:8000/v1 bash recipes/qwen14b.sh
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen14b.sh      # needs no GPU, and of the model its config.json alone
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
source recipes/plan_and_run.sh

MODEL=${MODEL:-Qwen/Qwen2.5-14B-Instruct}
DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen14b}
JUDGE=${JUDGE:-http://localhost:8000/v1}
STAGES=${STAGES:-sft grm cpe}
SFT="--model $MODEL --data $DATA/pairs.jsonl --out $OUT/sft --checkpoint-activations"
GRM="--model $MODEL --data $DATA/judgements.jsonl --out $OUT/grm --checkpoint-activations"
# memory, not the method, sets these two: fewer sequences at once, half of the tokens a pass
CPE="--judge $JUDGE --prompts $DATA/prompts_train.jsonl --out $OUT/cpe --max-batch 24 --tokens-per-microbatch 8192
    --checkpoint-activations --offload"

plan sft.py $SFT
plan train_grm.py $GRM
plan ppo_cpe.py --policy "$MODEL" $CPE
[ -z "${PLAN_ONLY:-}" ] || exit 0

for stage in $STAGES; do
    case $stage in
        sft) run sft.py $SFT ;;
        grm) run train_grm.py $GRM ;;
        cpe) run ppo_cpe.py --policy "$OUT/sft/policy" $CPE ;;
        *) echo "STAGES: $stage is none of sft, grm, cpe" >&2; exit 2 ;;
    esac
done
