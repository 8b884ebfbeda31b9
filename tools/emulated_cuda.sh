#!/usr/bin/env bash
# Compiles csrc/ops/cuda for the CPU, against the emulated CUDA device of tests/emulated_cuda, and runs the tests of kernels
# on it, with threads in two orders: in turn from launch to launch, or, where arguments name tests, all of them in one and
# then in the other. No GPU and no CUDA are needed. Arguments go to pytest. Status 77: cannot be built here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

compiler=${CXX:-g++}
libasan=$("$compiler" -print-file-name=libasan.so 2>/dev/null) || true
if [[ ! -f $libasan ]] || ! echo 'int main() {}' |
    "$compiler" -std=c++20 -fsanitize=thread,undefined -ftrivial-auto-var-init=pattern -x c++ -c - -o /dev/null; then
    echo "emulated_cuda.sh: needs a g++ 12 or newer with libasan; $compiler is none" >&2
    exit 77
fi
python tests/emulated_cuda/build_library.py >/dev/null # once, before the runs

export PYTHONPATH=$PWD:$PWD/tests/emulated_cuda OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16:allocator_may_return_null=1
# With the library whose exceptions the sanitizer follows, which Python itself does not load.
preload="$libasan $("$compiler" -print-file-name=libstdc++.so)"
run() { LD_PRELOAD=$preload python -m pytest -p emulated_cuda -p no:cacheprovider --maxfail=5 "$@"; }
if (($#)); then
    for order in 0 1; do EMULATED_CUDA_ORDER=$order run "$@"; done
else
    run tests/emulated_cuda/faults.py tests/kernels
fi
echo "emulated_cuda.sh: nothing found"
