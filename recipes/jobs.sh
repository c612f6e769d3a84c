# Sourced by recipes. Background jobs: their lines are marked, and they are stopped at exit.
set -m # each job is a process group, so that all of it can be stopped
# marked NAME COMMAND...: sed ignores the signal, so that a script can still print while it saves and ends
marked() { "${@:2}" 2>&1 | (trap "" TERM INT; exec sed -u "s/^/[$1] /"); }
made_with() { # made_with FOLDER SETTINGS: an error if the folder was made with other settings before
    mkdir -p "$1"
    [ -f "$1/made_with.txt" ] || echo "$2" > "$1/made_with.txt"
    [ "$(cat "$1/made_with.txt")" = "$2" ] ||
        { echo "error: $1 was made with $(cat "$1/made_with.txt"), not $2; choose another OUT" >&2; exit 1; }
}
all_done() { for job in $(jobs -p); do wait "$job"; done; }
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT
export OMP_NUM_THREADS=1 # two processes with one thread each do more than one process with two
export CUDA_VISIBLE_DEVICES= # on the CPU, also where there is a GPU
