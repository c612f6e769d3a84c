#!/usr/bin/env bash
# All benchmarks of a CPU, one after the other, as bench/RESULTS.md shows them. On two idle cores they take 40 minutes.
# The tables are in OUT/*.log. A benchmark whose peers or models are missing is left out, and a line says so.
#
#   bash bench/cpu.sh                                                   # what needs nothing else
#   PEERS_PYTHON=out/peers/bin/python TRL_PYTHON=out/trl/bin/python TINY=out/tiny bash bench/cpu.sh
#
# bench/cpu_engines.py says how to make the environment of PEERS_PYTHON, bench/peers.py that of TRL_PYTHON. TINY is the
# folder of a run of recipes/tiny.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
OUT=${OUT:-out/bench}
STAGES=${STAGES:-}
mkdir -p "$OUT"
failed=0

stage() { # stage NAME THREADS COMMAND...
    [[ -z $STAGES || " $STAGES " == *" $1 "* ]] || return 0
    local started=$SECONDS
    OMP_NUM_THREADS=$2 "${@:3}" > "$OUT/$1.log" 2>&1 || { failed=1; echo "$1 failed: see $OUT/$1.log"; return 0; }
    echo "$1: $OUT/$1.log ($((SECONDS - started)) s)"
}

stage kernels 2 python bench/kernels.py
stage generate 2 python bench/generate.py
stage train 2 python bench/train.py
stage cpu_engines 1 python bench/cpu_engines.py ${PEERS_PYTHON:+--peers-python "$PEERS_PYTHON"}
stage check_simulation 1 python bench/check_simulation.py
if [[ -n ${TRL_PYTHON:-} && -n ${TINY:-} ]]; then
    stage peers 1 "$TRL_PYTHON" bench/peers.py --model "$TINY/sft/policy" --prompts "$TINY/world/prompts_train.jsonl"
else
    echo "peers is left out: it needs TRL_PYTHON and TINY"
fi
exit $failed
