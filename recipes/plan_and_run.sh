# Sourced by the recipes for large models: GPUS ranks with GIB of memory each; PLAN_ONLY=1 stops after the memory plans.
#
#   bash recipes/RECIPE.sh                                # from the rows in DATA
#   bash recipes/RECIPE.sh --judge URL                    # no GRM is trained: rewards are those of that server
#   bash recipes/RECIPE.sh PERSONAS QUESTIONS FLAGS ...   # the rows first (recipes/own_data.sh, data/annotate.py)
GPUS=${GPUS:-8}
GIB=${GIB:-80}
JUDGE=${JUDGE:-}
RECIPE_ARGUMENTS=("$@")
if [ "${1:-}" = --judge ]; then
    JUDGE=${2:?usage: --judge URL}
    STAGES=${STAGES:-sft cpe}
    RECIPE_ARGUMENTS=()
fi

# make_rows: rows in DATA out of PERSONAS and QUESTIONS, if the recipe was given these.
make_rows() {
    [ ${#RECIPE_ARGUMENTS[@]} = 0 ] || DATA=$DATA STAGES=data bash recipes/own_data.sh "${RECIPE_ARGUMENTS[@]}"
}

# plan SCRIPT FLAGS ...: prints what the stage will hold in memory; the recipe stops here if that does not fit.
plan() {
    printf '\n== plan of %s\n' "$1"
    python "$@" --plan --world-size "$GPUS" --gpu-gib "$GIB"
}

# run SCRIPT FLAGS ...: the stage on GPUS ranks.
run() {
    printf '\n== %s (minute %s)\n' "$1" "$((SECONDS / 60))"
    torchrun --standalone --nproc_per_node="$GPUS" "$@"
}
