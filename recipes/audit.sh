#!/usr/bin/env bash
# How good are the paper's public weights? The released policies against GPT-4o's answers on PersonaFeedback's questions;
# the released GRM on PersonaFeedback's pairs and on Personalized-RewardBench; each policy's answers, scored by the GRM
# under their own and under another person's persona. It ends in one table with 95 % intervals. Run it again to resume.
#
#   bash recipes/audit.sh                                      # a GPU of 80 GB, and OPENAI_API_KEY for judge and baseline
#   GPUS=8 EVALUATION_FLAGS="--grm-template rubric.txt" bash recipes/audit.sh
#
# POLICIES, GRM    folders or hub ids
# JUDGE, BASELINE  GPT-4.1 and GPT-4o of api.openai.com. With the authors' file of GPT-4o's answers these are the baseline
# DATA, OUT        rows, fetched if they are missing; evaluations and OUT/table.md
# PAIRS, GPUS      number of pairs of each benchmark (0: all), number of ranks
# EVALUATION_FLAGS further flags of evaluate.py. The released models were trained with the authors' prompts, in Chinese,
#                  and are asked with ours, which may lower their figures. --grm-template FILE is another rubric;
#                  --answer-template FILE another prompt of the policy and of a baseline that is asked.
#                  OUT/*/*/table.md counts judgements that don't parse
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh

read -r -a policies <<< "${POLICIES:-PersonalAILab/Personalized-Qwen2.5-7B-Instruct PersonalAILab/Personalized-Qwen2.5-14B-Instruct}"
GRM=${GRM:-PersonalAILab/GRM-Qwen2.5-14B-Instruct}
JUDGE=${JUDGE:-pair:https://api.openai.com/v1#gpt-4.1}
BASELINE=${BASELINE:-https://api.openai.com/v1#gpt-4o}
DATA=${DATA:-out/audit/data}
OUT=${OUT:-out/audit}
PAIRS=${PAIRS:-0}
read -r -a flags <<< "${EVALUATION_FLAGS:-}"

[ -f "$DATA/pairs_eval.jsonl" ] || # the last file that it writes
    python data/prepare.py --source PersonalAILab/PersonaFeedback --out "$DATA"
[ -f "$DATA/rewardbench.jsonl" ] || # whole profiles would be longer than a judge's 8,192 tokens
    python data/prepare.py --source QiyaoMa/Personalized-RewardBench --profile-entries 20 --out "$DATA"
if [ ! -f "$DATA/personafeedback.jsonl" ]; then # of all persons
    cat "$DATA"/pairs.jsonl "$DATA"/pairs_eval.jsonl > "$DATA/pairs.tmp"
    mv "$DATA/pairs.tmp" "$DATA/personafeedback.jsonl"
fi
questions=$DATA/prompts_eval.jsonl
if [ -f "$DATA/prompts_winrate.jsonl" ]; then
    questions=$DATA/prompts_winrate.jsonl
    BASELINE=reference
fi

evaluate() { # evaluate TASK NAME FLAGS...: one journal, so that a policy answers each question once
    printf '\n== %s (minute %s)\n' "$OUT/$1/$2" "$((SECONDS / 60))"
    torchrun --standalone --nproc_per_node="${GPUS:-1}" evaluate.py --out "$OUT/$1/$2" --journal "$OUT" "${@:3}" "${flags[@]}"
}
for policy in "${policies[@]}"; do
    name=${policy//\//_}
    names+=("$name")
    answers=(--model "$policy" --prompts "$questions")
    evaluate win-rate "$name" --task win-rate "${answers[@]}" --baseline "$BASELINE" --judge "$JUDGE"
    evaluate persona-swap "$name" --task persona-swap "${answers[@]}" --judge "$GRM"
done
for benchmark in personafeedback rewardbench; do
    evaluate "$benchmark" "${GRM//\//_}" --task reward-accuracy --prompts "$DATA/$benchmark.jsonl" --n-prompts "$PAIRS" \
        --judge "$GRM"
done
python recipes/benchmark_table.py --folder "$OUT" --benchmarks win-rate persona-swap personafeedback rewardbench \
    --models "${names[@]}" "${GRM//\//_}"
