#!/usr/bin/env bash
# Everything that needs a GPU, in one go and in under ten minutes: build in place, test, check with compute-sanitizer,
# benchmark against the peers. Run in the repository root on a machine with a CUDA GPU, nvcc and torch >= 2.11.
#
#   OUT      folder for results (default: bench/results)
#   WHEELS   folder with wheels of peers (bitsandbytes, peft and what it needs), installed from there alone; optional
#   PYTHON   the interpreter that has torch (default: python3)
#
# A stage that fails or outlasts its time does not stop the next ones. The exit status is 1 where a test, the
# sanitizer or one of our own benchmark results failed, and the summary comes last.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TORCHINDUCTOR_COMPILE_THREADS=8

summary=()
failed=0

# stage NAME SECONDS fatal|soft COMMAND...: run it within its time, keep its log, note how it went
stage() {
    local name=$1 limit=$2 weight=$3 start=$SECONDS status
    shift 3
    echo "=== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/gpu-$name.log" | tail -n 40
    status=${PIPESTATUS[0]}
    local verdict=ok
    if [ "$status" -ge 124 ] && [ "$status" -ne 125 ]; then verdict="stopped (status $status)"; elif [ "$status" -ne 0 ]; then verdict="failed (status $status)"; fi
    if [ "$status" -ne 0 ] && [ "$weight" = fatal ]; then failed=1; fi
    summary+=("$(printf '%-22s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")")
    return "$status"
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
    nvcc --version | tail -n 2
    "$PYTHON" -c 'import sys, torch; print(sys.version); print("torch", torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())
import triton; print("triton", triton.__version__)'
}

# cmake and ninja may be Python packages or programs of the system, and pybind11 (for the NumPy module) may be missing.
build() {
    local capability
    capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || return 1
    # the architecture-specific targets hold the instructions (wgmma, tcgen05) that the plain ones leave out
    case $capability in 90 | 100 | 103 | 120) capability+=a ;; esac
    export TLKERNELS_CUDA=on TLKERNELS_CUDA_ARCHS="${TLKERNELS_CUDA_ARCHS:-$capability}" MAX_JOBS="$(nproc)"
    for tool in cmake ninja; do
        command -v "$tool" || "$PYTHON" -m "$tool" --version || { echo "build: $tool is missing"; return 1; }
    done
    "$PYTHON" -c 'import pybind11' || echo "build: pybind11 is missing, so the NumPy module is left out"
    "$PYTHON" setup.py build_ext --inplace || return 1
    "$PYTHON" -c 'import tlkernels.ops._registry as r; print(r.describe_libraries()); assert r.LIBRARIES["cuda"] == "loaded", r.LIBRARIES["cuda"]'
}

peers() {
    [ -n "${WHEELS:-}" ] || { echo "WHEELS is not set: only the peers that are installed already take part"; return 0; }
    local wheel status=0
    for wheel in "$WHEELS"/*.whl; do # one by one, so that one that does not fit leaves the others
        "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" --no-deps --target "$SITE" --upgrade "$wheel" || status=1
    done
    return "$status"
}

tests() {
    TLKERNELS_REQUIRE=cuda,triton "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider \
        --junitxml="$OUT/gpu-tests.xml" tests/ops/test_nf4_cuda.py tests/ops/test_nf4_triton.py
}

# Triton compiles every kernel for every kind of argument, so these may run out of time: what ran then counts.
tests_lora() {
    TLKERNELS_REQUIRE=triton "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider \
        --junitxml="$OUT/gpu-tests-lora.xml" tests/ops/test_lora_triton.py -k cuda
}

tests_contrastive() {
    TLKERNELS_REQUIRE=triton "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider \
        --junitxml="$OUT/gpu-tests-contrastive.xml" tests/ops/test_contrastive_triton.py -k cuda
}

tests_fisher() {
    TLKERNELS_REQUIRE=triton "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider \
        --junitxml="$OUT/gpu-tests-fisher.xml" tests/ops/test_fisher_triton.py -k cuda
}

tests_discrepancy() {
    TLKERNELS_REQUIRE=triton "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider \
        --junitxml="$OUT/gpu-tests-discrepancy.xml" tests/ops/test_mmd_triton.py -k cuda
}

# Each CUDA kernel on small and odd shapes.
SMOKE=$(cat <<'PYTHON'
import torch
import tlkernels
from tlkernels.ops import nf4

with tlkernels.backend("cuda"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((128, 256), (33, 97), (1, 1)):
            w = torch.randn(*shape, device="cuda").to(dtype)
            for double_quant in (False, True):
                weight = nf4.nf4_quantize(w)
                if double_quant:
                    with tlkernels.backend("reference"):
                        q, scale, offset = nf4.absmax_quantize(weight.absmax)
                    weight = weight._replace(absmax=q, absmax_scale=scale, absmax_offset=offset)
                nf4.nf4_dequantize(weight)
                nf4.nf4_dequantize(weight, out=torch.empty_like(w))
                for rows in (1, 3, 16):
                    nf4.nf4_linear(torch.randn(rows, shape[1], device="cuda").to(dtype), weight)
torch.cuda.synchronize()
print("smoke: every CUDA kernel ran")
PYTHON
)

# torch's caching allocator would hide overruns; torch's own kernels are left out, for time.
sanitize() {
    local tool status
    tool=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
    [ -n "$tool" ] || { echo "compute-sanitizer is not here"; return 0; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$tool" --tool memcheck --kernel-name-exclude kernel_substring=at:: \
        --error-exitcode 9 "$PYTHON" -c "$SMOKE" 2>&1 | tee "$SITE/sanitizer.log"
    status=${PIPESTATUS[0]}
    # some virtual machines do not let a debugger at the device: that says nothing about the kernels
    if grep -qi "device not supported\|LibraryNotLoaded" "$SITE/sanitizer.log"; then
        echo "compute-sanitizer cannot run on this machine"
        return 0
    fi
    return "$status"
}

benchmark() {
    "$PYTHON" -W ignore -m bench --family nf4 --device cuda --max-minutes 1.05 --out "$OUT/cuda-nf4.json"
}

# What the goals name comes first: bfloat16, forward and backward.
benchmark_lora() {
    "$PYTHON" -W ignore -m bench --family lora --device cuda --max-minutes 0.75 --dtypes bfloat16 \
        --shapes 4096x4096 --rows 64,512,8192 --out "$OUT/cuda-lora.json"
}

benchmark_contrastive() {
    "$PYTHON" -W ignore -m bench --family contrastive --device cuda --max-minutes 0.65 --dtypes bfloat16 \
        --op info_nce_both,siglip_both --shapes 32768x768,8192x768 --out "$OUT/cuda-contrastive.json"
}

benchmark_mmd() {
    "$PYTHON" -W ignore -m bench --family mmd --device cuda --max-minutes 0.35 --dtypes bfloat16,float32 \
        --op mmd5_both --shapes 4096x256,512x256 --out "$OUT/cuda-mmd.json"
}

benchmark_coral() {
    "$PYTHON" -W ignore -m bench --family coral --device cuda --max-minutes 0.2 --dtypes bfloat16,float32 \
        --op coral_both --out "$OUT/cuda-coral.json"
}

benchmark_fisher() {
    "$PYTHON" -W ignore -m bench --family fisher --device cuda --max-minutes 0.25 --dtypes bfloat16,float32 \
        --op diag_fisher,quad_penalty_both --out "$OUT/cuda-fisher.json"
}

benchmark_gradgram() {
    "$PYTHON" -W ignore -m bench --family gradgram --device cuda --max-minutes 0.15 --dtypes float32 \
        --out "$OUT/cuda-gradgram.json"
}

plots() {
    "$PYTHON" - "$OUT" <<'PYTHON'
import sys
from pathlib import Path
from bench import report

out = Path(sys.argv[1])
for path in sorted(out.glob("cuda-*.json")):
    result = report.Report.load(path)
    path.with_suffix(".md").write_text(report.markdown(result, report.write_plots(result, out)) + "\n")
PYTHON
}

export -f machine build peers tests tests_lora tests_contrastive tests_discrepancy tests_fisher sanitize
export -f benchmark benchmark_lora benchmark_contrastive benchmark_mmd benchmark_coral benchmark_fisher \
    benchmark_gradgram plots
export PYTHON OUT SITE SMOKE
WHEELS=${WHEELS:+$(cd "$WHEELS" && pwd)}
export WHEELS

stage machine 15 soft bash -c machine
stage peers 20 soft bash -c peers
if stage build 120 fatal bash -c build; then
    stage tests 80 fatal bash -c tests
    stage tests-lora 30 soft bash -c tests_lora
    stage tests-contrastive 30 soft bash -c tests_contrastive
    stage tests-discrepancy 25 soft bash -c tests_discrepancy
    stage tests-fisher 25 soft bash -c tests_fisher
    stage sanitizer 30 fatal bash -c sanitize
    stage benchmark 75 fatal bash -c benchmark
    stage benchmark-lora 55 fatal bash -c benchmark_lora
    stage benchmark-contrastive 50 fatal bash -c benchmark_contrastive
    stage benchmark-mmd 30 fatal bash -c benchmark_mmd
    stage benchmark-coral 20 fatal bash -c benchmark_coral
    stage benchmark-fisher 25 soft bash -c benchmark_fisher
    stage benchmark-gradgram 15 soft bash -c benchmark_gradgram
    stage plots 15 soft bash -c plots
fi

echo
echo "stage                  time  result"
printf '%s\n' "${summary[@]}"
echo "results: $OUT"
exit "$failed"
