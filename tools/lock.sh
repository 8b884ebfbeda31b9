#!/usr/bin/env bash
# Writes tools/requirements.lock: what the extra `all` installs, at the versions of tools/constraints.txt, with the hashes of
# the files. Run it when one of these two, or pyproject.toml, has changed. Needs uv (pip install uv).
#
# torch is left out, with what it brings (on newer Pythons setuptools as well): it is there in several builds, for CPUs and for each CUDA, of which one is
# installed first. Both follow:
#
#   pip install "$(grep '^torch==' tools/constraints.txt)"          # with the index of the build that you want
#   pip install --no-deps --require-hashes --requirement tools/requirements.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

{
    echo "# Made by tools/lock.sh of pyproject.toml and tools/constraints.txt: change those, not this. Without torch; see there."
    "${PYTHON:-python}" -m uv pip compile pyproject.toml --extra all --constraint tools/constraints.txt --quiet \
        --generate-hashes --python-platform x86_64-manylinux_2_28 --python-version 3.11 --no-header --no-annotate --no-emit-index-url |
        awk '/^[^ ]/ { left_out = /^(torch|triton|nvidia-|cuda-|setuptools)/ } !left_out'
} >tools/requirements.lock.part
mv tools/requirements.lock.part tools/requirements.lock
