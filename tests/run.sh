#!/usr/bin/env bash
# Format, lint, types and tests, on a CPU. Makes .venv at first use.
#
#   bash tests/run.sh            # everything, a process a core (at most four): minutes
#   bash tests/run.sh fast       # the inner loop, in one process: the maths, rows, parser, model, engine, judges
#   bash tests/run.sh tests/test_ppo.py -n 0 -k edit_loss -s     # arguments go to pytest; -n 0: in this process
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh

FAST=(tests/test_{ppo,prompts,rows,model,engine,judges,winrate,layout}.py)

ruff format --check --quiet .
ruff check --quiet .
mypy
export OMP_NUM_THREADS=1
if [ "${1:-}" = fast ]; then
    exec python -m pytest -q -m "not slow" "${FAST[@]}" "${@:2}"
fi
exec python -m pytest -q -n auto --maxprocesses 4 --dist worksteal "$@"
