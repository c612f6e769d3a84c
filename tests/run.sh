#!/usr/bin/env bash
# Runs the tests on a CPU. Makes .venv at first use.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
exec python -m pytest -q tests "$@"
