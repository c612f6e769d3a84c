#!/usr/bin/env bash
# Format, lint and tests, on a CPU, in a process a core (at most four; -n 0: in this one). Makes .venv at first use.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
ruff format --check --quiet .
ruff check --quiet .
OMP_NUM_THREADS=1 exec python -m pytest -q -n auto --maxprocesses 4 --dist worksteal tests "$@"
