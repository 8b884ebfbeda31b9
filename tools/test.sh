#!/usr/bin/env bash
# Sets itself up, then runs every check: lint, formatting, types, tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

export OMP_NUM_THREADS=1 # ranks of distributed tests share the cores
ruff check megalite tools tests
ruff format --check megalite tools tests
mypy
python -m pytest "$@"
