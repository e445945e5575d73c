#!/usr/bin/env bash
# The operators, called from Python, under AddressSanitizer and under valgrind (GCC, Linux, after `make test`).
# CPython and torch leak and read oddly on their own, so a leak or an invalid access counts where a function rbe_* is in its trace.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$root/build/sanitize
stage=$work/stage  # a copy of the package with the library under test, put before the installed one
export PATH="$(dirname "$python"):$PATH" PYTHONPATH=$stage PYTHONMALLOC=malloc PYTHONDONTWRITEBYTECODE=1

# $1: folder of a library
stage() {
    rm -rf "$stage" && mkdir -p "$stage" && cp -r "$root/rbe_torch" "$stage/" && cp "$1/librbe.so" "$stage/rbe_torch/" && cd "$stage"
}

# Every path of tests/test_leaks.py, $1 calls each, in one process
calls="
import sys
sys.path.append('$root/tests')
from test_leaks import PATHS, SCRIPT
import rbe_torch
assert rbe_torch.__file__.startswith('$stage'), rbe_torch.__file__
for path in PATHS.values():
    sys.argv[1:] = [path, '20']
    exec(SCRIPT, {'__name__': 'calls'})
"

# $1: name, $2: log, $3: how a record of an error begins there
verdict() {
    local ours
    ours=$(awk -v start="$3" -v ours='(in|:) rbe_[a-z]' '$0 ~ start { if (record ~ ours) print record; record = "" } { record = record "\n" $0 }
                              END { if (record ~ ours) print record }' "$2")
    [ -z "$ours" ] || { echo "$ours"; echo "$1: errors in librbe, above; everything is in $2"; exit 1; }
    echo "$1: no error in librbe"
}

echo "AddressSanitizer"
cmake -S "$root" -B "$work/asan" -DRBE_CUDA=0 -DRBE_SANITIZE=address >/dev/null
cmake --build "$work/asan" --target rbe --parallel >/dev/null
stage "$work/asan"
# libstdc++ beside libasan: the sanitizer must find __cxa_throw when it starts, and python itself does not bring it
preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so.6)"
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 "$python" -m pytest -p no:cacheprovider -c "$root/pyproject.toml" "$root/tests/test_operators.py"
LD_PRELOAD=$preload ASAN_OPTIONS=exitcode=0:fast_unwind_on_malloc=0 "$python" -c "$calls" 2>"$work/asan.log"
verdict AddressSanitizer "$work/asan.log" '(Direct|Indirect) leak of'

echo "valgrind"
cmake -S "$root" -B "$work/plain" -DRBE_CUDA=0 -DCMAKE_C_FLAGS=-g >/dev/null
cmake --build "$work/plain" --target rbe --parallel >/dev/null
stage "$work/plain"
valgrind -q --leak-check=full --show-leak-kinds=definite --error-limit=no --num-callers=30 --log-file="$work/valgrind.log" "$python" -c "$calls"
verdict valgrind "$work/valgrind.log" '==[0-9]+== $'
