#!/usr/bin/env bash
# What only a machine with an NVIDIA GPU can show: that the CUDA operators build, are exact, stay within their memory and
# are fast. Needs nvcc, torch's CUDA build and the build's tools, but no network. Arguments choose parts:
#
#   build      the operators, for the GPU at hand; `megalite ops`
#   tests      operators against float64, whole steps in fp32 and bf16 against the CPU, steps that never wait for the GPU
#   sanitize   a few of these under compute-sanitizer: memcheck, racecheck, synccheck
#   peaks      tools/bench/gpu_peaks.py: memory of steps, against the plan and the dry run
#   step       tools/bench/gpu_step.py of llama-1b, and of some layers of llama-8b
#   ops        tools/bench/ops.py
#
# Without a GPU: builds for the CPU, compiles the CUDA sources, and runs the benchmarks at toy sizes. Output is shown and
# kept in $OUT or build/gpu-check/logs, and report.md there is one page of it, for tools/bench/RESULTS.md. Each part has
# its time limit, all together 9 minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PATH="$PATH:/usr/local/cuda/bin"

python=${PYTHON:-python3}
site=$PWD/build/gpu-check/site logs=${OUT:-$PWD/build/gpu-check/logs}
mkdir -p "$logs"
# The package that `build` installs, not the source tree, which lacks the operators: hence -P, too.
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
failed=() rows=()

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 status begin=$SECONDS show=(cat)
    shift 2
    [[ $name == build ]] && show=(grep -iE 'cuda|warning|error|fatal')
    printf '\n== %s: %s\n' "$name" "$*"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$logs/$name.log" | "${show[@]}"
    status=${PIPESTATUS[0]}
    [[ $status == 124 ]] && echo "$name was stopped after its $limit s"
    [[ $status == 0 ]] || failed+=("$name")
    printf -- '-- %s: status %d, %d s\n' "$name" "$status" $((SECONDS - begin))
    rows+=("| $name | $([[ $status == 0 ]] && echo passed || echo "**failed** ($status)") | $((SECONDS - begin)) s |")
}

# report: what a reader wants of the logs, as one page of Markdown.
report() {
    echo "## gpu_check.sh, $(date -u +%F), commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    printf '\n    %s\n' "$(sed '2,$s/^/    /' "$logs/machine.log")"
    printf '\n| part | result | time |\n|---|---|---|\n'
    printf '%s\n' "${rows[@]}"
    [[ ! -f $logs/peaks.log ]] || printf '\n%s\n' "$(grep '^|' "$logs/peaks.log")"
    for name in operators step step-8b ops; do
        [[ ! -f $logs/$name.log ]] || printf '\n%s:\n\n```\n%s\n```\n' "$name" "$(tail -n 40 "$logs/$name.log")"
    done
    for name in "${failed[@]}"; do
        [[ ! -f $logs/$name.log ]] || printf '\n%s failed:\n\n```\n%s\n```\n' "$name" "$(tail -n 15 "$logs/$name.log")"
    done
}

build() {
    export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
    [[ -z $gpu ]] || export CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$gpu ${CMAKE_ARGS:-}"
    part build 110 "$python" -m pip install --no-index --no-deps --no-build-isolation --disable-pip-version-check \
        --upgrade --target "$site" --verbose .
    part operators 15 "$python" -P -m megalite ops
    if [[ -n $gpu ]] && ! "$python" -P -c 'import sys, torch, megalite._ops as ops; sys.exit(not ops.has_cuda)'; then
        echo "the operators were built without CUDA; $logs/build.log says why"
        failed+=("build with CUDA")
    fi
}

tests() {
    local pytest=("$python" -P -m pytest -p no:cacheprovider)
    if [[ -n $gpu ]]; then
        part tests 80 "${pytest[@]}" --cuda tests/kernels tests/test_cuda.py \
            --ignore tests/kernels/test_cuda_sources.py --ignore tests/kernels/test_emulated_cuda.py # the GPU is here
    else
        part tests 90 "${pytest[@]}" tests/kernels/test_cuda_sources.py
    fi
}

sanitize() {
    [[ -n $gpu ]] || return 0
    command -v compute-sanitizer >/dev/null || { echo "there is no compute-sanitizer on the PATH" && return 0; }
    local tool some='contiguous or test_layer_norm or of_some_columns or adamw_against or sum_of or forth_and_back'
    for tool in memcheck racecheck synccheck; do
        # torch hands out pieces of large blocks: without its cache, each tensor has bounds of its own.
        part "$tool" 35 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$python" -P -m pytest -p no:cacheprovider --cuda tests/kernels \
            --ignore tests/kernels/test_attention_kernels.py -k "cuda and ($some)"
    done
}

peaks() {
    if [[ -n $gpu ]]; then
        part peaks 50 "$python" tools/bench/gpu_peaks.py
    else
        part peaks 50 "$python" tools/bench/gpu_peaks.py --device cpu
    fi
}

ops() {
    if [[ -n $gpu ]]; then
        part ops 60 "$python" tools/bench/ops.py --device cuda
    else
        part ops 60 "$python" tools/bench/ops.py --device cpu --no-compile --repeats 3
    fi
}

step() {
    if [[ -n $gpu ]]; then
        part step 70 "$python" tools/bench/gpu_step.py --preset llama-1b --batch 2 --steps 10
        # With fp32 master weights, moments and gradients, all 32 layers of 8B would take 144 GB.
        part step-8b 50 "$python" tools/bench/gpu_step.py --preset llama-8b --batch 1 --seq-length 8192 --steps 6 \
            model.num_layers=8
    else
        part step 130 "$python" tools/bench/gpu_step.py --preset llama-1m --seq-length 64 --steps 3 --device cpu
    fi
}

# CMake's name of the GPU, or nothing.
gpu=$("$python" -c '
import torch
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(f"{major}{minor}{chr(97) if major == 9 else str()}-real")')
{
    "$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
    nvcc --version 2>/dev/null | grep release
} | tee "$logs/machine.log"
missing=$("$python" -c '
import importlib.util
needed = "numpy pydantic yaml rich safetensors tokenizers pytest hypothesis pybind11 scikit_build_core".split()
print(*[name for name in needed if not importlib.util.find_spec(name)])')
[[ -z $missing ]] || echo "not installed, and needed: $missing"
[[ -n $gpu ]] || echo "torch sees no GPU: what can be checked without one follows"

(($#)) || set -- build tests sanitize peaks step ops
for name in "$@"; do
    case $name in
    build | tests | sanitize | peaks | step | ops) ;;
    *) echo "'$name' is no part; these are: build, tests, sanitize, peaks, step, ops" >&2 && exit 2 ;;
    esac
    [[ $name == build || -d $site/megalite ]] || { echo "'$name' needs 'build' before it" >&2 && exit 2; }
    "$name"
done

report >"$logs/report.md"
printf '\nlogs: %s; all of it on one page: report.md\n' "$logs"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all passed"
