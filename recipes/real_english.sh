#!/usr/bin/env bash
# Does a real model learn from edits what it never says? English questions, people with one concern each, and a rule judge
# whose critiques dictate what to add (recipes/real_english.py). How often the policy says it before RL is measured; one
# run has targets that are common, seldom and rare. It ends in a table over seeds. Run it again to go on.
#
#   bash recipes/real_english.sh CHECKPOINT                           # two CPU cores, hours (docs/results.md)
#   SEEDS=0 STEPS=2 PEOPLE=8 N=2 bash recipes/real_english.sh CHECKPOINT     # does it run?
#
# CHECKPOINT: folder or hub id of a small instruct model (Qwen2.5, Qwen3 or Llama format). Stages: the model's own answers;
# SFT on good ones and on rewrites that insert other things; samples of that policy, and the targets chosen by their rates;
# edits of that policy, as a gate; PPO, CPE and RAFT with edits for each seed; answers to questions of other people.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh

CHECKPOINT=${1:?usage: bash recipes/real_english.sh CHECKPOINT}
OUT=${OUT:-out/real_english}
DATA=$OUT/data
SEEDS=${SEEDS:-0 1 2}
STEPS=${STEPS:-60}
PEOPLE=${PEOPLE:-100}
N=${N:-5}
METHODS=${METHODS:-ppo cpe}
stage() { printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"; }
sample() { # sample MODEL ROWS ANSWERS N
    [ -f "$3" ] || python generate.py --model "$1" --input "$2" --output "$3" --n "$4" --temperature 0.8 \
        --max-new-tokens 64 --answer-template "$DATA/answer.txt" --dtype fp32
}

stage "the model's own answers"
[ -f "$DATA/questions.jsonl" ] || python recipes/real_english.py questions --people "$PEOPLE" --out "$DATA"
sample "$CHECKPOINT" "$DATA/questions.jsonl" "$DATA/answers.jsonl" 2

stage "SFT: good ones of them, and rewrites that insert other things"
[ -f "$DATA/sft.jsonl" ] || python recipes/real_english.py sft --answers "$DATA/answers.jsonl" --out "$DATA"
python sft.py --model "$CHECKPOINT" --data "$DATA/sft.jsonl" --out "$OUT/sft" --epochs 2 --batch-size 16 --lr 1e-4 \
    --answer-template "$DATA/answer.txt" --tokens-per-microbatch 2048 --dtype fp32

stage "what this policy says, and the targets"
sample "$OUT/sft/policy" "$DATA/questions.jsonl" "$DATA/samples.jsonl" "$N"
[ -f "$DATA/rates.json" ] || python recipes/real_english.py prompts --people "$PEOPLE" --answers "$DATA/samples.jsonl" \
    --out "$DATA"

rl=(--prompts "$DATA/prompts_train.jsonl" --judge recipes/real_english.py:judge --model "$OUT/sft/policy"
    --answer-template "$DATA/answer.txt" --edit-template "$DATA/edit.txt" --prompts-per-step 8 --mini-batch-prompts 4
    --max-prompt-length 192 --max-new-tokens 64 --judge-max-new-tokens 48 --temperature 0.8 --top-p 1 --epochs 1000
    --tokens-per-microbatch 2048 --max-steps "$STEPS" --lr "${RL_LR:-1e-5}" --critic-lr "${CRITIC_LR:-3e-5}"
    --dtype fp32)
declare -A flags=([ppo]="--edit-rate 0 --n-samples 6" [cpe]="--edit-loss none --edit-below 4.9"
    [paper]="--edit-loss paper --edit-below 4.9" [raft]="--edit-below 4.9")

stage "gate: edits of this policy by the critiques that RL will have"
python ppo_cpe.py "${rl[@]}" --edit-rate 1 --critic-warmup-steps "$STEPS" --max-steps 4 --out "$OUT/gate"
python recipes/real_english.py gate --answers "$OUT/gate" --out "$DATA"

answers=()
for seed in $SEEDS; do
    for method in $METHODS; do
        stage "$method, seed $seed"
        script=ppo_cpe.py
        if [ "$method" = raft ]; then
            script=exp/raft.py
            [ -f "$script" ] || python recipes/fork.py raft
        fi
        read -ra own <<< "${flags[$method]}"
        python "$script" "${rl[@]}" "${own[@]}" --seed "$seed" --out "$OUT/$method$seed"
        sample "$OUT/$method$seed/policy" "$DATA/prompts_dev.jsonl" "$OUT/$method$seed/answers.jsonl" "$N"
        answers+=("$method=$OUT/$method$seed/answers.jsonl")
    done
done

stage "the table"
sample "$OUT/sft/policy" "$DATA/prompts_dev.jsonl" "$OUT/sft/answers.jsonl" "$N"
python recipes/real_english.py table --answers "sft=$OUT/sft/answers.jsonl" "${answers[@]}" --out "$OUT"
