#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth, for a machine that is lent for minutes; see docs/gpu.md.
#
#     bash scripts/gpu_session.sh kernels FOLDER    tests on the GPU, then the layer's benchmark: about 8 minutes
#     bash scripts/gpu_session.sh curves FOLDER     gap against top-2 at equal time: about 5 minutes
#
# Where nothing can be downloaded, carry what is missing as wheels in ./wheels:
#     pip download -d wheels --python-version 3.12 --only-binary=:all: --platform manylinux2014_x86_64 \
#         pydantic tomli-w rich
set -uo pipefail
cd "$(dirname "$0")/.."
stage=${1:?kernels or curves}
out=${2:?a folder for results}
mkdir -p "$out"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python3 -c 'import pydantic, tomli_w, rich' 2>/dev/null || python3 -m pip install --quiet --no-index --find-links wheels pydantic tomli-w rich
case $stage in
kernels)
    timeout 130 python3 -m pytest -q -W default -p no:cacheprovider tests/nn/test_gpu_kernels.py tests/nn/test_gpu_routing.py tests/nn/test_gpu_fp8.py \
        -k 'not 512 and not compiled and not operators' 2>&1 | tail -40 | tee "$out/tests.txt"
    timeout 330 python3 benchmarks/moe_layer_gpu.py --out "$out" --minutes "${MINUTES:-5}" > "$out/log.txt" 2>&1
    tail -60 "$out/table.txt"
    if command -v compute-sanitizer > /dev/null; then
        timeout 45 compute-sanitizer --tool memcheck python3 -m pytest -q -W default -p no:cacheprovider \
            tests/nn/test_gpu_kernels.py -k 'lone and loop' 2>&1 | tail -5 | tee "$out/memcheck.txt"
    fi
    ;;
curves)
    timeout 280 python3 benchmarks/equal_time.py --steps "${STEPS:-1000}" --out "$out" > "$out/log.txt" 2>&1
    tail -8 "$out/log.txt"
    rm -rf "$out"/data "$out"/*/checkpoints "$out"/*/data
    ;;
esac
