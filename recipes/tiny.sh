#!/usr/bin/env bash
# The whole pipeline in the generated world, on two CPU cores: base -> SFT -> GRM and BT -> PPO (BT), PPO (GRM), CPE
# -> evaluation by the exact judge. It ends in one table. Everything is under OUT; run it again to resume an
# interrupted run.
#
#   bash recipes/tiny.sh                             # 15 to 20 minutes
#   OUT=out/quick SCALE=0.05 bash recipes/tiny.sh    # does it run? Too few steps for its table to mean anything
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
source recipes/world_flags.sh

OUT=${OUT:-out/tiny}
SCALE=${SCALE:-1}
SEED=${SEED:-0}

WORLD=$OUT/world
scaled() { python -c "print(max($2, round($1 * $SCALE)))"; }  # scaled STEPS_OF_THE_FULL_RECIPE AT_LEAST
EVAL_PROMPTS=$(scaled 200 20)
stage() { printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"; }

stage "the generated world"
[ -f "$WORLD/judgements_eval.jsonl" ] || python data/persona_world.py --out "$WORLD" --seed "$SEED"

stage "base: from random weights, on answers, rewrites and judgements of mixed quality"
python sft.py --from-scratch "$WORLD/tokenizer" --data "$WORLD/base_corpus.jsonl" --out "$OUT/base" "${BASE_FLAGS[@]}" \
    --max-steps "$(scaled 624 100)" --seed "$SEED"

stage "SFT: the chosen answers"
python sft.py --model "$OUT/base/policy" --data "$WORLD/pairs.jsonl" --out "$OUT/sft" "${SFT_FLAGS[@]}" \
    --max-steps "$(scaled 62 2)" --seed "$SEED"

stage "GRM: critique and scores"
python train_grm.py --model "$OUT/base/policy" --data "$WORLD/judgements.jsonl" --out "$OUT/grm" "${GRM_FLAGS[@]}" \
    --max-steps "$(scaled 186 40)" --seed "$SEED" --eval-data "$WORLD/judgements_eval.jsonl" --eval-max-new-tokens 96

stage "BT: the Bradley-Terry baseline, on the pairs"
python train_grm.py --objective bt --model "$OUT/base/policy" --data "$WORLD/pairs.jsonl" --out "$OUT/bt" \
    "${BT_FLAGS[@]}" --max-steps "$(scaled 62 2)" --seed "$SEED" --eval-data "$WORLD/pairs_eval.jsonl"

stage "gates: does the policy read profiles, does the GRM judge well?"  # a shortened run misses them and goes on
python recipes/gates.py --world "$WORLD" --policy "$OUT/sft/policy" --grm "$OUT/grm/model" --out "$OUT/gates" ||
    [ "$SCALE" != 1 ]

rl=(--model "$OUT/sft/policy" --prompts "$WORLD/prompts_train.jsonl" "${RL_FLAGS[@]}" --lr 5e-5
    --max-steps "$(scaled 40 2)" --seed "$SEED")
stage "PPO, rewarded by BT"
python ppo_cpe.py "${rl[@]}" --judge "bt:$OUT/bt/model" "${PPO_FLAGS[@]}" --out "$OUT/ppo_bt"
stage "PPO, rewarded by the GRM"
python ppo_cpe.py "${rl[@]}" --judge "$OUT/grm/model" "${PPO_FLAGS[@]}" --out "$OUT/ppo_grm"
stage "PPO with critique-post-edit"
python ppo_cpe.py "${rl[@]}" --judge "$OUT/grm/model" --out "$OUT/cpe"

stage "evaluation: answers to unseen people's questions, scored by the exact judge, against those of SFT"
mkdir -p "$OUT/eval"
table=()
for run in "base=base" "SFT=sft" "PPO (BT)=ppo_bt" "PPO (GRM)=ppo_grm" "CPE=cpe"; do
    name=${run#*=}
    python evaluate.py --model "$OUT/$name/policy" --baseline "$OUT/sft/policy" --prompts "$WORLD/prompts_eval.jsonl" \
        --n-prompts "$EVAL_PROMPTS" "${EVALUATION_FLAGS[@]}" --seed "$SEED" --out "$OUT/eval/$name" \
        > "$OUT/eval/$name.log"
    table+=("${run%=*}=$OUT/eval/$name")
done
stage "done; $EVAL_PROMPTS questions"
python recipes/draw.py tiny --runs "${table[@]}" --edits-of "$OUT/cpe" | tee "$OUT/table.txt"
