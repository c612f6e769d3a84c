#!/usr/bin/env bash
# The whole pipeline on the generated world, on two CPU cores: base -> SFT -> GRM and BT -> PPO (BT), PPO (GRM), CPE ->
# evaluation by the exact judge. Ends in one table. An interrupted run goes on where it was.
#
#   bash recipes/tiny.sh                     # OUT=out/tiny, about 15 minutes
#   OUT=out/quick SCALE=0.1 bash recipes/tiny.sh   # a tenth of every step count: does it run?
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh

OUT=${OUT:-out/tiny}
SCALE=${SCALE:-1}
SEED=${SEED:-0}
steps() { python -c "import sys; print(max(2, round(float(sys.argv[1]) * $SCALE)))" "$1"; }
stage() { printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"; }

WORLD=$OUT/world
TEMPLATES="--answer-template $WORLD/templates/answer.txt"
JUDGE_TEMPLATES="$TEMPLATES --grm-template $WORLD/templates/grm.txt"
ALL_TEMPLATES="$JUDGE_TEMPLATES --edit-template $WORLD/templates/edit.txt"

stage "the generated world"
[ -f "$WORLD/prompts_eval.jsonl" ] || python data/persona_world.py --output "$WORLD" --seed "$SEED"
