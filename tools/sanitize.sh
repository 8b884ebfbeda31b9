#!/usr/bin/env bash
# Builds csrc/data with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, and runs its tests and the
# fuzzers of files that it reads on that build. The first finding ends a test with a report.
#
#   bash tools/sanitize.sh            # a sample
#   bash tools/sanitize.sh --whole    # complete sweeps, some minutes; further arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

folder=build/sanitize
suffix=$(python -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
read -ra includes <<< "$(python -m pybind11 --includes)"
mkdir -p "$folder/objects"
objects=()
for source in csrc/data/*.cpp; do
  object=$folder/objects/$(basename "$source" .cpp).o
  objects+=("$object")
  if [[ $object -nt $source && $object -nt csrc/data/module.h ]]; then continue; fi
  g++ -std=c++17 -g -O1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-omit-frame-pointer \
    -fsanitize=address,undefined -fno-sanitize-recover=undefined "${includes[@]}" -c "$source" -o "$object"
done

# The package, but for this module.
rm -rf "$folder/megalite"
cp -rs "$PWD/megalite" "$folder/megalite"
rm -f "$folder"/megalite/_data*.so
g++ -shared -fsanitize=address,undefined "${objects[@]}" -o "$folder/megalite/_data$suffix"

export PYTHONPATH=$PWD/$folder PYTHONSAFEPATH=1 PYTHONMALLOC=malloc OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
export ASAN_OPTIONS=detect_leaks=0:quarantine_size_mb=16:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
# With the library whose exceptions the sanitizer follows, which Python itself does not load.
LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export LD_PRELOAD
python -c "import megalite._data as found; assert '$folder' in found.__file__, found.__file__"
python -m pytest -p no:cacheprovider tests/data/test_native_limits.py tests/data/test_gather.py \
  tests/data/test_packing.py tests/data/test_megatron_order.py tests/data/test_order.py tests/data/test_blocks.py \
  tests/data/test_documents_of_samples.py tests/data/test_indexed.py "$@"
count=60
if [[ " $* " == *" --whole "* ]]; then count=2000; fi
PYTHONPATH=$PYTHONPATH:$PWD/tests python tests/security/fuzz.py "$count" "$folder/case" tokens texts
echo "sanitize.sh: nothing found"
