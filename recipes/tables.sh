#!/usr/bin/env bash
# The paper's questions in miniature, on two CPU cores: recipes/cells.py trains and evaluates the models,
# recipes/draw.py writes the tables and figures into results/. A finished cell (one trained and evaluated model) is not
# run again, so the command can be interrupted and repeated at any time.
#
#   bash recipes/tables.sh              # all tables, 3 to 5 seeds
#   bash recipes/tables.sh --quick      # the main comparison and a few other cells, one seed
#   bash recipes/tables.sh --search     # how the learning rates were chosen: on another seed and other prompts
#   bash recipes/tables.sh --only-draw  # tables and figures of the finished cells, no run
#   bash recipes/tables.sh --rarity     # when do edits pay? recipes/rarity.py, which takes these flags too
set -euo pipefail
cd "$(dirname "$0")/.."
source recipes/environment.sh
if [ "${1:-}" = --rarity ]; then
    shift
    exec python recipes/rarity.py "$@"
fi
exec python recipes/cells.py "$@"
