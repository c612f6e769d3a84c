#!/usr/bin/env bash
# Format, lint and tests, on a CPU. Makes .venv at first use.
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
ruff format --check --quiet .
ruff check --quiet .
exec python -m pytest -q tests "$@"
