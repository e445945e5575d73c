#!/usr/bin/env bash
# Everything that needs a GPU, in one go and under ten minutes: build for it, check the kernels on it against the kernels run on the CPU and against
# float64, look for races and wrong accesses, then time. Needs nvcc, g++, a CUDA build of torch >= 2.10, cmake, pytest; no network.
#     benchmarks/cuda_on_device.sh [OUT [OPTIONS OF benchmarks/on_cuda.py]]        PYTHON=python3 by default
# tests/cuda/dry_run.py runs these lines on a machine without a GPU.
set -eu
cd "$(dirname "$0")/.."
out=${1:-out}
[ $# = 0 ] || shift
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} RBE_CUDA=1 RBE_CUDA_ARCHITECTURES=${RBE_CUDA_ARCHITECTURES:-native}

step() { echo "== $*"; }

step "build for this device"
"$python" setup.py -q build_ext --inplace
"$python" -c 'import rbe_torch; print(rbe_torch.show_config())'

if cmake -S . -B build/on_host -DRBE_ON_HOST=ON -DRBE_CUDA=0 >/dev/null 2>&1; then
    step "the kernels on the CPU write vectors, the device is checked against them"
    cmake --build build/on_host --parallel --target rbe_on_host cublaslt_standin >/dev/null
    host=build/on_host/tests/cuda stage=$(mktemp -d)
    trap 'rm -rf "$stage"' EXIT
    cp -r rbe_torch "$stage/" && cp "$host/librbe_on_host.so" "$stage/rbe_torch/librbe.so"
    (export PYTHONPATH=$stage RBE_CUBLASLT=$PWD/$host/libcublaslt_standin.so && "$python" tests/cuda/vectors.py write "$stage/vectors.pt")
    "$python" tests/cuda/vectors.py check "$stage/vectors.pt"
else
    step "skipped: vectors of the kernels on the CPU (needs a C++ compiler, Linux, x86-64)"
fi

step "tests on the device, against float64"
"$python" -m pytest -q tests/test_cuda.py -k 'not kernels_on_the_host'
"$python" -m pytest -q tests/test_operators.py tests/test_gradients.py tests/test_compiler.py tests/test_interleaved.py tests/test_calibrate.py -k "cuda and not aot"

if command -v compute-sanitizer >/dev/null; then
    option=--kernel-regex filters=()  # the name of the option in older versions
    if compute-sanitizer --help | grep -q -e --kernel-name; then option=--kernel-name; fi
    for kernel in tiles_half fragments arrange pad_codes gather_f32 decode widen add_scaled round_tokens lookup token_ backward_table dense_ \
        sort_rows unpack pack finish_ transpose narrow_basis encode find_unit turn_basis factor_blocks fill_search; do
        filters+=("$option" "kns=$kernel")
    done
    for tool in memcheck racecheck; do
        step "compute-sanitizer $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
            "${filters[@]}" "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k 'layer_moved or nothing_waits or encoded'
    done
else
    step "skipped: compute-sanitizer (not on PATH)"
fi

step "static gates"
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
"$python" tests/cuda/gates.py --arch "$arch" >"$out/cuda_gates.txt" || { cat "$out/cuda_gates.txt"; exit 1; }

step "benchmark"
"$python" benchmarks/on_cuda.py --out "$out" "$@"
