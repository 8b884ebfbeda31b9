#!/usr/bin/env bash
# Builds csrc for aarch64, the processor of Grace hosts, with Debian's cross compiler, and runs the tests of kernels and of
# data helpers there under qemu. Python and torch of that processor come from Debian and PyPI into build/aarch64, once.
# Arguments go to pytest. Status 77: the compiler or qemu is missing (apt install g++-aarch64-linux-gnu qemu-user-static).
# `--kernels`: only the CPU kernels, without Python and torch: half a minute, nothing is downloaded. They must compute what
# they compute on this processor.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

if [[ ${1-} == --kernels ]]; then
    needs=(aarch64-linux-gnu-g++ qemu-aarch64-static g++)
else
    needs=(aarch64-linux-gnu-g++ qemu-aarch64-static apt-get cmake)
fi
for needed in "${needs[@]}"; do
    command -v "$needed" >/dev/null || { echo "aarch64.sh: there is no $needed" >&2 && exit 77; }
done
here=$PWD/build/aarch64 torch=2.10.0 # the last that PyPI has for this processor without CUDA; the oldest that is supported
mkdir -p "$here"

if [[ ${1-} == --kernels ]]; then
    # The flags of csrc/ops/ops.cmake. Built again only where a source has changed.
    flags=(-std=c++20 -Wno-psabi -fopenmp-simd -fno-math-errno -fno-trapping-math -ffp-contract=fast -DMEGALITE_ISA=base)
    sources=(tests/aarch64/kernels.cpp csrc/ops/cpu/*.cpp)
    key=$(cat tools/aarch64.sh "${sources[@]}" csrc/ops/*.h csrc/ops/cpu/*.h | sha256sum | cut -c1-16)
    built=$here/kernels-$key
    if [[ ! -d $built ]]; then
        rm -rf "$here"/kernels-*
        mkdir -p "$built"
    fi
    build() { # FILE COMPILER FLAG...: a build that was interrupted leaves no FILE
        [[ -f $1 ]] || { "${@:2}" "${flags[@]}" -o "$1.part" "${sources[@]}" && mv "$1.part" "$1"; }
    }
    build "$built/aarch64" aarch64-linux-gnu-g++ -O2 -static
    build "$built/here" g++ -O1
    "$built/here" >"$built/here.txt"
    qemu-aarch64-static "$built/aarch64" >"$built/aarch64.txt"
    python3 tests/aarch64/compare.py "$built/here.txt" "$built/aarch64.txt"
    exit
fi

if [[ ! -f $here/root/done ]]; then
    rm -rf "$here/root" "$here/apt"
    mkdir -p "$here"/apt/{state/lists/partial,cache/archives/partial,debs} "$here/root"
    apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$here/apt/state"
        -o Dir::State::status=/dev/null -o Dir::Cache="$here/apt/cache" -o APT::Sandbox::User=root)
    "${apt[@]}" update
    (cd "$here/apt/debs" && "${apt[@]}" download python3.11-minimal libpython3.11-{minimal,stdlib,dev} libc6 libgcc-s1 \
        libstdc++6 zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1 libtinfo6 libgomp1)
    for package in "$here"/apt/debs/*.deb; do dpkg -x "$package" "$here/root"; done
    touch "$here/root/done"
fi
if [[ ! -f $here/site/done ]]; then
    rm -rf "$here/site"
    pip=(python -m pip install -q --disable-pip-version-check --target "$here/site" --python-version 3.11
        --only-binary=:all: --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64)
    "${pip[@]}" --no-deps "torch==$torch"
    "${pip[@]}" --upgrade filelock sympy networkx jinja2 fsspec numpy pydantic pyyaml rich safetensors tokenizers \
        orjson setuptools pybind11 pytest pytest-timeout hypothesis
    touch "$here/site/done"
fi

# Python of that processor, as a program that CMake and the tests can call.
cat >"$here/python" <<END
#!/usr/bin/env bash
export PYTHONPATH="$here/package:$here/site:$PWD/tests" OMP_NUM_THREADS=1
exec qemu-aarch64-static -L "$here/root" "$here/root/usr/bin/python3.11" "\$@"
END
chmod +x "$here/python"

cmake -S csrc -B "$here/cmake" -Wno-dev -DCMAKE_BUILD_TYPE=Release -DCMAKE_SYSTEM_NAME=Linux \
    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DPython_EXECUTABLE="$here/python" \
    -DPython_INCLUDE_DIR="$here/root/usr/include/python3.11" -DCMAKE_CXX_FLAGS="-I$here/root/usr/include" -Dpybind11_DIR="$here/site/pybind11/share/cmake/pybind11" \
    -DPYTHON_MODULE_EXTENSION=.cpython-311-aarch64-linux-gnu.so -DPYBIND11_FINDPYTHON=ON
cmake --build "$here/cmake" --parallel "${CMAKE_BUILD_PARALLEL_LEVEL:-2}"
rm -rf "$here/package"
mkdir -p "$here/package"
cp -r megalite "$here/package/"
find "$here/package" -name '*.so' -delete
cp "$here"/cmake/_*.so "$here/package/megalite/"

(($#)) || set -- tests/kernels/test_norm_kernels.py tests/kernels/test_rope_kernels.py \
    tests/kernels/test_activation_kernels.py tests/kernels/test_loss_kernels.py tests/data/test_gather.py \
    --deselect tests/kernels/test_rope_kernels.py::test_compiled_by_inductor # it calls a compiler, which is not of that processor
"$here/python" -m megalite ops
"$here/python" -P -m pytest -p no:cacheprovider --maxfail=5 "$@"
echo "aarch64.sh: nothing found"
