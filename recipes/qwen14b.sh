#!/usr/bin/env bash
# The paper's 14B run on one node of 8 x 80 GB, like recipes/qwen7b.sh, except that the GRM of the last stage runs on
# another machine: the paper served it on two further GPUs. JUDGE is the URL of any OpenAI-compatible server of
# OUT/grm/model.
#
#   STAGES="sft grm" bash recipes/qwen14b.sh [PERSONAS QUESTIONS FLAGS ...]     # see recipes/plan_and_run.sh
#   STAGES=cpe JUDGE=http://OTHER_MACHINE:8000/v1 bash recipes/qwen14b.sh
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen14b.sh      # needs no GPU, and only config.json of the model
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
source recipes/plan_and_run.sh

MODEL=${MODEL:-Qwen/Qwen2.5-14B-Instruct}
DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen14b}
JUDGE=${JUDGE:-http://localhost:8000/v1}
read -r -a stages <<< "${STAGES:-sft grm cpe}"
sft=(--model "$MODEL" --data "$DATA/pairs.jsonl" --out "$OUT/sft" --checkpoint-activations)
grm=(--model "$MODEL" --data "$DATA/judgements.jsonl" --out "$OUT/grm" --checkpoint-activations)
# --max-batch and --tokens-per-microbatch are lower than at 7B because of memory; they do not change the method
# Where critiques ask for what the policy's samples hardly ever have, add --edit-ratio none (docs/results.md)
cpe=(--judge "$JUDGE" --prompts "$DATA/prompts_train.jsonl" --out "$OUT/cpe" --max-batch 24
    --tokens-per-microbatch 8192 --checkpoint-activations --offload)

plan sft.py "${sft[@]}"
plan train_grm.py "${grm[@]}"
plan ppo_cpe.py --model "$MODEL" "${cpe[@]}"
[ -z "${PLAN_ONLY:-}" ] || exit 0

make_rows
for stage in "${stages[@]}"; do
    case $stage in
        sft) run sft.py "${sft[@]}" ;;
        grm) run train_grm.py "${grm[@]}" ;;
        cpe) run ppo_cpe.py --model "$OUT/sft/policy" "${cpe[@]}" ;;
        *) echo "STAGES: $stage is none of sft, grm, cpe" >&2; exit 2 ;;
    esac
done
