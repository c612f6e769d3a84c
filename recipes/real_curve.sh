#!/usr/bin/env bash
# PPO and critique-post-edit, side by side, from one real pretrained chat model on two CPU cores. Both runs have English
# prompts and an exact rule judge that writes critiques (recipes/real_curve.py). It ends in their learning curves.
#
#   bash recipes/real_curve.sh CHECKPOINT                  # an hour
#   MINUTES=1 bash recipes/real_curve.sh CHECKPOINT        # does it run?
#   JUDGE=my.py:reward ROWS=FOLDER bash recipes/real_curve.sh CHECKPOINT      # prompts_train.jsonl and prompts_dev.jsonl
#
# CHECKPOINT: folder or hub id of a small instruct model (Qwen2.5, Qwen3 or Llama format). LORA="" trains all
# weights. A run that is out of time saves and ends; the same command continues it.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
source recipes/jobs.sh

CHECKPOINT=${1:?usage: bash recipes/real_curve.sh CHECKPOINT}
OUT=${OUT:-out/real_curve}
MINUTES=${MINUTES:-60}
SEED=${SEED:-0}
JUDGE=${JUDGE:-recipes/real_curve.py:judge}
LORA=${LORA---lora-rank 16}
ROWS=${ROWS:-$OUT/data}
[ -f "$ROWS/prompts_dev.jsonl" ] || python recipes/real_curve.py rows --out "$ROWS" --seed "$SEED"

mkdir -p "$OUT"
echo "Answer the question of the person below in a few sentences.

{persona}

{question}" > "$OUT/answer.txt"
echo "{critique} Rewrite the answer so that this is done. Output only the new answer." > "$OUT/edit.txt"
rl=(--model "$CHECKPOINT" --judge "$JUDGE" --prompts "$ROWS/prompts_train.jsonl" --eval-data "$ROWS/prompts_dev.jsonl"
    --eval-every "${EVAL_EVERY:-5}" --eval-n "${EVAL_N:-16}" --answer-template "$OUT/answer.txt" --edit-template "$OUT/edit.txt"
    --prompts-per-step "${PROMPTS:-8}" --mini-batch-prompts 4 --max-prompt-length 256 --max-new-tokens 96
    --judge-max-new-tokens 64 --temperature "${TEMPERATURE:-0.7}" --top-p 1 --epochs 1000 --tokens-per-microbatch 4096 --save-every 10
    --lr "${RL_LR:-5e-4}" --critic-lr "${CRITIC_LR:-1e-3}" --dtype fp32 --seed "$SEED")
read -ra lora <<< "$LORA"

run() { # run NAME FLAGS...: for MINUTES, then it saves and ends with status 75
    timeout --foreground --signal TERM "$((MINUTES * 60))" \
        python ppo_cpe.py "${rl[@]}" "${lora[@]}" "${@:2}" --out "$OUT/$1" || [ $? = 124 ] # of timeout, not of the run
}
marked PPO run ppo --edit-rate 0 --n-samples 6 &
marked CPE run cpe &
all_done
python recipes/real_curve.py curve --runs "PPO=$OUT/ppo" "CPE=$OUT/cpe" --out "$OUT"
