# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: puts all the project needs into .venv. Takes a moment when nothing has changed.
# Works on a bare machine with Python 3.11 or newer. torch comes with CUDA where pip's index offers that, which is gigabytes;
# with `--cpu` as the first argument of either script it comes without, which is a tenth.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || return
cpu=
if [[ ${1:-} == --cpu ]]; then cpu=1; shift; fi # of the script that sources this one, too

# Says what is being done, which of how many, and how long it took.
stage() { # WHAT COMMAND...
    local began=$SECONDS
    stages=$((stages + 1))
    echo "  $stages of 3: $1"
    "${@:2}"
    echo "     took $((SECONDS - began)) s"
}

# Compiles while pip, which takes one core, installs what megalite uses. `pip` is that of setup_environment.
install_megalite() ( # a shell of its own, as it has a trap
    log=$(mktemp)
    set -m # so that the compilers, too, are in a group that can be stopped
    # Against the torch that is installed, not a second one in a build environment of its own.
    "${pip[@]}" --quiet --no-build-isolation --no-deps --editable . >"$log" 2>&1 &
    set +m
    trap 'kill -- "-$!" 2>/dev/null || true; rm -f "$log"' EXIT
    "${pip[@]}" --no-build-isolation --only-deps '.[all,dev]'
    wait "$!" || { cat "$log" >&2; exit 1; }
)

setup_environment() {
    local wanted python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "megalite needs Python 3.11 or newer; '$python' is not. Set PYTHON=/path/to/python3.11" >&2
        return 1
    }
    # The names of modules too: an editable install remembers where each of them was.
    wanted=$({ "$python" --version; cat pyproject.toml tools/constraints.txt; find megalite -name '*.py' | sort
        find csrc -type f | sort | xargs cat; } | sha256sum)
    if [[ $(cat .venv/.megalite 2>/dev/null) != "$wanted" ]]; then
        echo "setting up .venv (once)"
        if [[ -z $cpu && ! -x .venv/bin/python && ! -d /proc/driver/nvidia ]]; then
            echo "  torch with its CUDA libraries is gigabytes to download, and this machine shows no NVIDIA GPU:"
            echo "  bash $0 --cpu${*:+ ${*@Q}} takes a torch without them"
        fi
        [[ -x .venv/bin/python ]] || "$python" -m venv .venv
        local stages=0 torch pip=(.venv/bin/python -m pip install --disable-pip-version-check --constraint tools/constraints.txt)
        # A person sees what is downloaded, and how much of it; a log has the stages.
        [[ -t 1 ]] || pip+=(--quiet)
        # The pip of older Pythons takes three times as long to find what goes together.
        "${pip[@]}" --quiet --upgrade pip
        # torch first and by exact version: another package would pull in whichever is newest.
        torch=$(grep '^torch==' tools/constraints.txt)
        stage torch "${pip[@]}" ${cpu:+--extra-index-url https://download.pytorch.org/whl/cpu} "$torch${cpu:++cpu}" numpy
        stage "what builds megalite" "${pip[@]}" scikit-build-core pybind11 cmake ninja
        stage "megalite, whose kernels are compiled (some minutes), and what it uses" install_megalite
        echo "$wanted" >.venv/.megalite
    fi
    export PATH="$root/.venv/bin:$PATH"
}

setup_environment "$@"
