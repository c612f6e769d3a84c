# Sourced by recipes that run stages side by side: background jobs, whose lines are marked and which are stopped at exit.
set -m # each job is a process group, so that all of it can be stopped
marked() { "${@:2}" 2>&1 | sed -u "s/^/[$1] /"; } # marked NAME COMMAND...
all_done() { for job in $(jobs -p); do wait "$job"; done; }
trap 'for job in $(jobs -p); do kill -- "-$job" 2>/dev/null || true; done' EXIT
export OMP_NUM_THREADS=1 # two processes with one thread each do more than one process with two
