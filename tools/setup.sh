# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: puts all the project needs into .venv. Takes a moment when nothing has changed.
# Works on a bare machine with Python 3.11 or newer; torch's CUDA build comes where pip's index offers it.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || return

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
        echo "setting up .venv (once; torch with its CUDA libraries is gigabytes to download)"
        [[ -x .venv/bin/python ]] || "$python" -m venv .venv
        local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt)
        echo "  torch"
        # torch first and by exact version: another package would pull in whichever is newest.
        "${pip[@]}" "$(grep '^torch==' tools/constraints.txt)" numpy
        echo "  what builds megalite"
        "${pip[@]}" scikit-build-core pybind11 cmake ninja
        echo "  megalite, whose kernels are compiled, and what it uses"
        # Built against the torch that is installed, not a second one in a build environment of its own.
        "${pip[@]}" --no-build-isolation --editable '.[all,dev]'
        echo "$wanted" >.venv/.megalite
    fi
    export PATH="$root/.venv/bin:$PATH"
}

setup_environment
