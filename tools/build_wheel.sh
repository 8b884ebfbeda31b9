#!/usr/bin/env bash
# Builds what can be handed out, into dist/ or OUT: the sdist, and from it a wheel for CPUs, whose kernels are there for
# several instruction sets and chosen when they run.
#
#   bash tools/build_wheel.sh [OUT]
#
#   PYTHON=...   one that has what builds megalite, the torch to build against among it; without it that of .venv, which
#                is set up. A wheel is for one Python and one minor version of torch, and says so.
#
# The wheel's tag is of the oldest glibc that it runs on, as auditwheel finds it: on Debian 12 manylinux_2_34. Run this
# in a manylinux_2_28 container, and it is the one that torch's own wheels have.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ -n ${PYTHON:-} ]] || source tools/setup.sh
python=$(command -v "${PYTHON:-python}")
mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# What the builder's own machine can do must not get into it.
unset CFLAGS CXXFLAGS CPPFLAGS LDFLAGS CMAKE_ARGS

say() { printf '== %s\n' "$*"; }

say "sdist"
"$python" -c 'import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])' "$work" >/dev/null
sdist=$(echo "$work"/*.tar.gz)
tar -xzf "$sdist" -C "$work"
source=${sdist%.tar.gz}

say "wheel, of what is in the sdist"
torch=$("$python" -c 'import torch; print(".".join(torch.__version__.split(".")[:2]))')
# The operators are linked against torch, whose C++ interface changes with every minor version.
sed -i "s/\"torch>=[0-9.]*\"/\"torch==$torch.*\"/" "$source/pyproject.toml"
grep -qF "torch==$torch.*" "$source/pyproject.toml"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --disable-pip-version-check \
    --config-settings=build-dir="$work/build" --wheel-dir "$work" "$source"
wheel=$(echo "$work"/*.whl)

say "no instruction that an older CPU lacks outside of the kernels that are chosen when they run"
for library in "$work"/build/_{data,dryrun,ops}.*.so; do
    objdump --disassemble --demangle --no-show-raw-insn "$library" | awk -v library="$(basename "$library")" '
        /^[0-9a-f]+ </ { function_ = $0 }
        # Copies that the compiler makes for one kernel ("clone") are called by it alone.
        /^ *[0-9a-f]+:\tv/ && function_ !~ /avx2|avx512|\[clone/ { print library ": " function_ $0; found = 1; exit }
        END { exit found }'
done

say "tag"
# torch's libraries are there before ours are loaded: they are not packed a second time.
PATH="$(dirname "$python"):$PATH" "$python" -m auditwheel repair --wheel-dir "$out" \
    --exclude 'libtorch*.so*' --exclude 'libc10*.so*' "$wheel" 2>&1 | grep -E 'Fixed-up|manylinux|error' || true
cp "$sdist" "$out"
ls -l "$out"/megalite-*
