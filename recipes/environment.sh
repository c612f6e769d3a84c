# Sourced by the recipes and tests/run.sh: creates .venv from requirements.txt on first use and puts it on the PATH.
# With --help it prints the comment at the top of the script that sources it, which has changed to the root of the project.
if [ "${1:-}" = --help ]; then
    case $0 in /*) script=$0 ;; *) script=$OLDPWD/$0 ;; esac
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$script"
    exit
fi
if ! cmp -s requirements.txt .venv/installed.txt; then
    python=$(command -v python3.11 || command -v python3.12 || command -v python3)
    [ -x .venv/bin/pip ] || "$python" -m venv .venv
    echo "installing requirements.txt into .venv (some minutes)"
    .venv/bin/python -m pip install --quiet --requirement requirements.txt && cp requirements.txt .venv/installed.txt ||
        { echo "the installation failed" >&2; exit 1; }
fi
export PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false
