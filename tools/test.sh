#!/usr/bin/env bash
# Sets itself up, then runs every check: lint, formatting, types, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=1 # ranks of distributed tests share the cores
ruff check megalite tools tests
ruff format --check megalite tools tests
mypy
# Three lanes on two cores: many tests wait, for a time limit or for ranks. The tests of a file stay together, as some share
# what they have trained, and tests/conftest.py says which files come first. `bash tools/test.sh -n 0` runs all in one process.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
