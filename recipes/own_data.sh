#!/usr/bin/env bash
# Your own personas and questions through the whole pipeline (docs/own-data.md): rows, answers of several models, pairs
# and judgements by a language model, the quality sheet, SFT, GRM, PPO with critique-post-edit, evaluation. Everything is
# under OUT; run it again to resume an interrupted run.
#
#   bash recipes/own_data.sh PERSONAS QUESTIONS --models a=URL#MODEL b=URL#MODEL --scorer URL#MODEL --judge URL#MODEL
#   PREPARE_FLAGS="--question-column text" bash recipes/own_data.sh people.csv asked.csv --judge URL ...
#   STAGES=data bash recipes/own_data.sh people.csv - --writer URL#MODEL ...     # questions are written, and no training
#
# PERSONAS, QUESTIONS   .csv, .jsonl or .parquet files (data/prepare.py); with QUESTIONS `-` questions are written
# flags                 go to data/annotate.py (with --plan it prints the cost, and the recipe stops)
# MODEL                 the model to train
# DATA                  folder of the rows
# STAGES                some of data, sft, grm, cpe, evaluate
# JUDGE                 of the stages cpe and evaluate; default: the GRM that stage grm trains
# GPUS                  ranks of a stage
# PREPARE_FLAGS, SFT_FLAGS, GRM_FLAGS, CPE_FLAGS, EVALUATION_FLAGS   further flags
#
# A tenth of the persons are held out. With few of them, hold out more: --eval-share 0.3, a flag of data/annotate.py where
# questions are written, else of PREPARE_FLAGS.
set -euo pipefail
usage="usage: bash recipes/own_data.sh PERSONAS QUESTIONS [flags of data/annotate.py]"
cd "$(dirname "$0")/.."
source recipes/environment.sh
PERSONAS=$(cd "$OLDPWD" && realpath "${1:?$usage}")
QUESTIONS=${2:?$usage}
[ "$QUESTIONS" = - ] || QUESTIONS=$(cd "$OLDPWD" && realpath "$QUESTIONS")
shift 2

MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
OUT=${OUT:-out/own}
DATA=${DATA:-$OUT/data}
JUDGE=${JUDGE:-$OUT/grm/model}
GPUS=${GPUS:-1}
read -r -a stages <<< "${STAGES:-data sft grm cpe evaluate}"
for name in PREPARE SFT GRM CPE EVALUATION; do
    flags=${name}_FLAGS
    read -r -a "${name,,}" <<< "${!flags:-}"
done
run() { # run SCRIPT FLAGS...: on GPUS ranks
    printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"
    if [ "$GPUS" = 1 ]; then python "$@"; else torchrun --standalone --shutdown-timeout 600 --nproc_per_node="$GPUS" "$@"; fi
}
data() {
    if [ "$QUESTIONS" = - ]; then
        set -- --personas "$PERSONAS" "$@"
    else
        python data/prepare.py --personas "$PERSONAS" --questions "$QUESTIONS" --out "$DATA" "${prepare[@]}"
    fi
    python data/annotate.py --out "$DATA" "$@"
    case " $* " in *" --plan "*) exit 0 ;; esac
    python report.py "$DATA"
    if [ ! -s "$DATA/prompts_eval.jsonl" ]; then
        echo "no person is held out, so that nothing could be evaluated; see --eval-share in this recipe's --help" >&2
        exit 2
    fi
}
train_grm() { # with no judgements of persons that are held out, none are judged at the end
    local held_out=()
    [ ! -s "$DATA/judgements_eval.jsonl" ] || held_out=(--eval-data "$DATA/judgements_eval.jsonl")
    run train_grm.py --model "$MODEL" --data "$DATA/judgements.jsonl" --out "$OUT/grm" "${held_out[@]}" "${grm[@]}"
}

for stage in "${stages[@]}"; do
    case $stage in
        data) data "$@" ;;
        sft) run sft.py --model "$MODEL" --data "$DATA/pairs.jsonl" --out "$OUT/sft" "${sft[@]}" ;;
        grm) [ "$JUDGE" != "$OUT/grm/model" ] || train_grm ;;
        cpe) run ppo_cpe.py --model "$OUT/sft/policy" --judge "$JUDGE" --prompts "$DATA/prompts_train.jsonl" \
            --out "$OUT/cpe" "${cpe[@]}" ;;
        evaluate) run evaluate.py --model "$OUT/cpe/policy" --baseline "$OUT/sft/policy" --judge "$JUDGE" \
            --prompts "$DATA/prompts_eval.jsonl" --out "$OUT/evaluate" "${evaluation[@]}" ;;
        *) echo "STAGES: $stage is none of data, sft, grm, cpe, evaluate" >&2; exit 2 ;;
    esac
done
