#!/usr/bin/env bash
# Builds the native module with AddressSanitizer and UndefinedBehaviorSanitizer, beside the installed package, and runs
# the kernels' tests on it with every instruction set of this CPU: sanitize.sh PYTHON [PYTEST OPTION ...]
# The first finding ends the process that has it, with a report. Memory reuse stays off: a pool's blocks have no ends.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1")
shift
compiler=${CXX:-c++}

preload=""
for library in libasan.so libubsan.so libstdc++.so; do  # libstdc++: what throws must be there before the sanitizer
  path=$("$compiler" -print-file-name="$library" 2>/dev/null || true)
  if [ ! -e "$path" ]; then
    echo "make sanitize: skipped: $compiler has no $library"
    exit 0
  fi
  preload+="$path "
done

folder=$PWD/build/sanitize
CXX=$compiler "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$folder/site" \
  --config-settings=cmake.build-type=Sanitize --config-settings=install.strip=false \
  --config-settings=build-dir="$folder/objects" .

export PYTHONPATH=$folder/site
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
# XLA's code is the same for every instruction set: kernels are called by name. Only the first waits for it.
export JAX_COMPILATION_CACHE_DIR=$folder/compiled
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

sanitized() { LD_PRELOAD=$preload "$python" "$@"; }

# v4 is v4bf16 but for products of bfloat16, and time is short.
usable='import os
from jaxext import _native
assert _native.__file__.startswith(os.environ["PYTHONPATH"]), _native.__file__
isas = _native.compiled_isas()[: _native.compiled_isas().index(_native.active_isa()) + 1]
print(*(isa for isa in isas if isa != "v4" or isa == isas[-1]))'
# Values and gradients at all sizes, not JAX's transformations. Of conformance bfloat16 alone: property tests draw
# both, and without attention, whose own test needs no reference in JAX.
tests="(forward_is_as_exact or gradients_are_as_exact) and bfloat16 and not attention- or products_are_exact \
  or infinite_and_nan or any_shape or match_float64 or large_results"
isas=$(sanitized -P -c "$usable")
for isa in $isas; do
  echo "-- $isa"
  [ "$isa" = "${isas##* }" ] && threads=" or threads" || threads=""  # how work is spread is the same for all
  JAXEXT_ISA=$isa sanitized -P -m pytest -q -n 2 -p no:cacheprovider tests/kernels \
    -k "($tests$threads) and not every_instruction_set" "$@"
done
