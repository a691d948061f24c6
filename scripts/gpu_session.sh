#!/usr/bin/env bash
# Everything that needs a GPU, in the order of its worth, for a machine that is lent for minutes; see docs/gpu.md.
#
#     bash scripts/gpu_session.sh kernels FOLDER    tests on the GPU, then the layer's benchmark: at most 7 minutes
#     bash scripts/gpu_session.sh curves FOLDER     gap against top-2 at equal time: at most 5 minutes
#
# What is left in FOLDER is at most eight small files. Where nothing can be downloaded, carry what is missing in ./wheels
# (3 MB; the platform is Linux on x86-64 with Python 3.12). A pure Python package to compare with, as ScatterMoE is, may
# lie there as a folder.
#     pip download -d wheels --python-version 3.12 --implementation cp --only-binary=:all: \
#         --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 pydantic tomli-w
set -uo pipefail
cd "$(dirname "$0")/.."
stage=${1:?kernels or curves}
out=${2:?a folder for results}
mkdir -p "$out"
site=$(mktemp -d)
export PYTHONPATH=$PWD:$site:$PWD/wheels PYTHONUNBUFFERED=1
if ! python3 -c 'import pydantic, tomli_w' 2> /dev/null; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" wheels/*.whl || exit 1
fi

test_on_gpu() { # seconds, arguments of pytest
    local together=()
    python3 -c 'import xdist' 2> /dev/null && together=(-n 8)
    timeout -k 5 "$1" python3 -m pytest -q -W default -p no:cacheprovider -p no:benchmark "${together[@]}" "${@:2}" 2>&1
}

case $stage in
kernels)
    test_on_gpu 100 tests/nn/test_gpu_kernels.py tests/nn/test_gpu_routing.py tests/nn/test_gpu_fp8.py \
        -k 'not 512 and not compiled and not operators' | tail -60 | tee "$out/tests.txt"
    rm -f "$out"/{result.json,table.txt,problems.txt,log.txt}
    end=$(($(date +%s) + ${BENCH_SECONDS:-300}))
    for _ in 1 2 3 4 5; do # a device that was lost is asked again, without what lost it
        left=$((end - $(date +%s)))
        [ "$left" -gt 15 ] || break
        timeout -k 5 $((left + 20)) python3 benchmarks/moe_layer_gpu.py --out "$out" --seconds "$left" --resume >> "$out/log.txt" 2>&1
        [ $? -eq 75 ] || break
    done
    tail -90 "$out/table.txt"
    [ -s "$out/table.txt" ] || tail -40 "$out/log.txt"
    left=$((end - $(date +%s)))
    if [ "$left" -gt 20 ] && command -v compute-sanitizer > /dev/null; then
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$left" compute-sanitizer --tool memcheck python3 -m pytest -q \
            -W default -p no:cacheprovider tests/nn/test_gpu_kernels.py -k 'lone and loop' 2>&1 | tail -8 | tee "$out/memcheck.txt"
    fi
    ;;
curves)
    timeout -k 5 280 python3 benchmarks/equal_time.py --seconds "${TRAIN_SECONDS:-70}" --out "$out" > "$out/log.txt" 2>&1
    tail -12 "$out/log.txt"
    rm -rf "$out"/data "$out"/*/checkpoints "$out"/*/data "$out"/*/loads.trace
    ;;
esac
