#!/usr/bin/env bash
# SFT, GRM and PPO with critique-post-edit for Qwen2.5-Instruct of one size, with the paper's hyperparameters, which are
# the scripts' defaults (docs/method.md 1.3, 1.4, 1.6). The memory plans of all stages come first. Run it again to
# resume an interrupted run.
#
#   bash recipes/qwen.sh 0.5b    # one GPU of 80 GB, 32 prompts a step instead of the paper's 128: a complete run to look at
#   bash recipes/qwen.sh 7b      # the paper's 7B run on 8 x 80 GB; the GRM runs in the processes that train
#   bash recipes/qwen.sh 14b     # the paper's 14B run on 8 x 80 GB; a server has the GRM (the paper: two further GPUs):
#       STAGES="sft grm" bash recipes/qwen.sh 14b
#       STAGES=cpe JUDGE=http://OTHER_MACHINE:8000/v1 bash recipes/qwen.sh 14b    # an OpenAI-compatible server of the GRM
#
#   bash recipes/qwen.sh SIZE                               # from the rows in DATA
#   bash recipes/qwen.sh SIZE --judge URL                   # no GRM is trained: rewards are those of that server
#   bash recipes/qwen.sh SIZE PERSONAS QUESTIONS FLAGS...   # makes the rows first (recipes/own_data.sh, data/annotate.py)
#   PLAN_ONLY=1 MODEL=FOLDER bash recipes/qwen.sh SIZE      # needs no GPU, and only config.json of the model
#
# MODEL: folder or hub id. DATA: rows of data/prepare.py and data/annotate.py. OUT: run folders. STAGES: some of sft, grm,
# cpe. GPUS: number of ranks. GIB: memory of a GPU; GIB=24 plans for a smaller card.
set -euo pipefail
usage="usage: bash recipes/qwen.sh 0.5b|7b|14b [PERSONAS QUESTIONS FLAGS... | --judge URL]"
cd "$(dirname "$0")/.."
source recipes/environment.sh
SIZE=${1:?$usage}
shift

DATA=${DATA:-out/data}
OUT=${OUT:-out/qwen$SIZE}
STAGES=${STAGES:-sft grm cpe}
JUDGE=${JUDGE:-}
if [ "${1:-}" = --judge ]; then
    JUDGE=${2:?$usage}
    shift 2
fi
[ -z "$JUDGE" ] || STAGES=${STAGES/grm/} # a judge is given: no GRM is trained
# which --edit-loss to take: docs/method.md 2.1
cpe=(--prompts "$DATA/prompts_train.jsonl" --out "$OUT/cpe" --checkpoint-activations)
case $SIZE in
    0.5b)
        GPUS=${GPUS:-1}
        MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
        cpe+=(--prompts-per-step 32 --mini-batch-prompts 16)
        ;;
    7b)
        MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
        cpe+=(--offload --max-batch 64) # all originals of a step, on each rank
        ;;
    14b)
        MODEL=${MODEL:-Qwen/Qwen2.5-14B-Instruct}
        JUDGE=${JUDGE:-http://localhost:8000/v1}
        cpe+=(--offload --max-batch 24 --tokens-per-microbatch 6144) # less memory than at 7B; the method is the same
        ;;
    *) echo "$usage" >&2; exit 2 ;;
esac
GPUS=${GPUS:-8}
GIB=${GIB:-80}
sft=(--model "$MODEL" --data "$DATA/pairs.jsonl" --out "$OUT/sft" --checkpoint-activations)
grm=(--model "$MODEL" --data "$DATA/judgements.jsonl" --out "$OUT/grm" --checkpoint-activations)
read -r -a stages <<< "$STAGES"

plan() { # plan SCRIPT FLAGS...: what the stage will hold in memory; the recipe stops here if that does not fit
    printf '\n== plan of %s\n' "$1"
    python "$@" --plan --world-size "$GPUS" --gpu-gib "$GIB"
}
run() { # run SCRIPT FLAGS...: on GPUS ranks
    printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"
    torchrun --standalone --nproc_per_node="$GPUS" "$@"
}

plan sft.py "${sft[@]}"
case $STAGES in *grm*) plan train_grm.py "${grm[@]}" ;; esac
plan ppo_cpe.py --model "$MODEL" --judge "${JUDGE:-$MODEL}" "${cpe[@]}"
[ -z "${PLAN_ONLY:-}" ] || exit 0

[ $# = 0 ] || DATA=$DATA STAGES=data bash recipes/own_data.sh "$@"
for stage in "${stages[@]}"; do
    case $stage in
        sft) run sft.py "${sft[@]}" ;;
        grm) run train_grm.py "${grm[@]}" ;;
        cpe) run ppo_cpe.py --model "$OUT/sft/policy" --judge "${JUDGE:-$OUT/grm/model}" "${cpe[@]}" ;;
        *) echo "STAGES: $stage is none of sft, grm, cpe" >&2; exit 2 ;;
    esac
done
