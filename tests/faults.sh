#!/usr/bin/env bash
# 200 kills of all stages and 48 damaged checkpoints, each continued and compared (tests/faults.py); the table goes into
# docs/reliability.md. About ten minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
OMP_NUM_THREADS=1 exec python tests/faults.py --table docs/reliability.md "$@"
