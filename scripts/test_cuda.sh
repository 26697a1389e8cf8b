#!/usr/bin/env bash
# Builds the library alone and runs what needs a CUDA device, on a machine with one. It takes torch 2.11 or newer with
# CUDA, nvcc, g++, cmake, ninja and pytest, and no network: neither the driver nor GoogleTest is built.
#
#   scripts/test_cuda.sh [build] [test] [memcheck] [racecheck] [bench] [host] [--sanitize] [--bench]
#
#   build       libgptq.so in build-cuda
#   test        tests/python/test_cuda.py; tests of the driver are skipped where build/bin/gptq is not there
#   memcheck    those tests under compute-sanitizer, but for graphs and whole models
#   racecheck   those of the kernels under compute-sanitizer
#   bench       scripts/bench_quantize.py and scripts/bench_peers.py, to build-cuda/bench_*.json
#   host        the instruction sets of the host's processor: the same bits from each, then bench_peers.py with two threads
#               on the best, to build-cuda/bench_host_*.json
#   --sanitize  build and test, then memcheck and racecheck
#   --bench     build and test, then bench
#
# Without a step: build and test. Each step is stopped after GPTQ_STEP_SECONDS, 540 by default.
#
#   GPTQ_PYTHON              the interpreter that has torch; default python3
#   GPTQ_CUDA_ARCHITECTURES  what nvcc builds for; default: that of the device, or 80 and 90 without one
#   GPTQ_RACECHECK_TESTS     pytest's -k of racecheck, which takes the longest; default "linear and not graph"
#   GPTQ_BENCH_OPTIONS       further options of bench_peers.py, such as --quick

set -euo pipefail
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
say() { echo "test_cuda.sh: $*"; }

steps=()
further=()
for argument in "$@"; do
  case $argument in
    build | test | memcheck | racecheck | bench | host) steps+=("$argument") ;;
    --sanitize) further+=(memcheck racecheck) ;;
    --bench) further+=(bench) ;;
    -h | --help) usage && exit ;;
    *) usage >&2 && exit 2 ;;
  esac
done
if ((${#steps[@]} == 0)); then steps=(build test); fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${GPTQ_PYTHON:-python3}
folder=build-cuda
seconds=${GPTQ_STEP_SECONDS:-540}
if ! command -v nvcc >/dev/null && [[ -x /usr/local/cuda/bin/nvcc ]]; then PATH=$PATH:/usr/local/cuda/bin; fi
export PYTHONPATH=$PWD/ops/python${PYTHONPATH:+:$PYTHONPATH}
export GPTQ_LIBRARY=$PWD/$folder/lib/libgptq.so
export PYTHONUNBUFFERED=1

bounded() { timeout --kill-after=10 "$seconds" "$@"; }

architectures() {
  "$python" -c 'import torch
found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
print(";".join(sorted({f"{major}{minor}" for major, minor in found})) or "80;90")'
}

need_device() {
  "$python" -c 'import sys, torch
sys.exit(None if torch.cuda.is_available() else "test_cuda.sh: torch sees no CUDA device")'
}

step_build() {
  local torch
  torch=$("$python" -c 'import torch; print(torch.__path__[0])')
  cmake -S . -B $folder -G Ninja -DCMAKE_BUILD_TYPE=Release "-DGPTQ_TORCH_DIR=$torch" \
    "-DCMAKE_CUDA_ARCHITECTURES=${GPTQ_CUDA_ARCHITECTURES:-$(architectures)}" \
    -DGPTQ_CUDA=ON -DGPTQ_BUILD_DRIVER=OFF -DGPTQ_BUILD_TESTS=OFF -DGPTQ_INSTALL=OFF
  bounded cmake --build $folder
}

step_test() {
  need_device
  bounded "$python" -m pytest tests/python/test_cuda.py -v --durations=10 -p no:cacheprovider
}

# check TOOL TESTS
check() {
  need_device
  bounded compute-sanitizer --tool "$1" --target-processes all --error-exitcode 9 \
    "$python" -m pytest tests/python/test_cuda.py -v -p no:cacheprovider -k "$2"
}

# A block of its own for each tensor, so that reading past it is seen; nothing can be captured then.
step_memcheck() { PYTORCH_NO_CUDA_MEMORY_CACHING=1 check memcheck "not graph and not model"; }
step_racecheck() { check racecheck "${GPTQ_RACECHECK_TESTS:-linear and not graph}"; }

step_bench() {
  need_device
  bounded "$python" scripts/bench_quantize.py --device cuda --shapes 4096x4096 --json $folder/bench_quantize.json
  # shellcheck disable=SC2086
  bounded "$python" scripts/bench_peers.py --device cuda --minutes $((seconds / 60 - 1)) \
    --json $folder/bench_peers.json ${GPTQ_BENCH_OPTIONS:-}
}

step_host() {
  local input
  bounded "$python" -m pytest tests/python/test_ops.py -v -p no:cacheprovider -k level
  for input in f32 bf16; do
    # shellcheck disable=SC2086
    bounded "$python" scripts/bench_peers.py --inputs $input --threads 2 --minutes $((seconds / 120)) \
      --json $folder/bench_host_$input.json ${GPTQ_BENCH_OPTIONS:-}
  done
}

for step in "${steps[@]}" "${further[@]}"; do
  say "$step"
  "step_$step"
done
say "done: ${steps[*]} ${further[*]}"
