#!/usr/bin/env bash
# The paper's questions in miniature, on two CPU cores: every table of recipes/tables.py, into results/. A cell (one trained
# and evaluated model) that is finished is not run again, so the command can be stopped and given again at any time.
#
#   bash recipes/tables.sh              # all tables, 3 to 5 seeds
#   bash recipes/tables.sh --quick      # the main comparison and a few other cells, one seed
#   bash recipes/tables.sh --search     # how the learning rates were chosen: on another seed and other prompts
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
exec python recipes/tables.py "$@"
