# Sourced by the recipes for large models: GPUS ranks with GIB of memory each; PLAN_ONLY=1 stops after the memory plans.
GPUS=${GPUS:-8}
GIB=${GIB:-80}

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
