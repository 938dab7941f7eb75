#!/usr/bin/env bash
# On the GPU machine: tests and both `ipc` benchmarks in one go; logs and results to $OUT.
#   bash benchmarks/run_ipc_gpu.sh BUNDLE_DIR STEP...
#   steps: sweep kernels sparse-kernels sparse 8b moe peer engine bridge bridge-8b bridge-own
eval "$(bash benchmarks/gpu_machine.sh "$1")"
shift
out=${OUT:-/tmp}
t0=$(date +%s)
step() { # name, seconds, pattern, command...
  local name=$1 limit=$2 pattern=$3 rc
  shift 3
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  echo "[$(($(date +%s) - t0)) s] $name rc=$rc"
  grep -aE "$pattern" "$out/$name.log" | cut -c1-430 | tail -n 30
}
py="python3 -m pytest -q -p no:cacheprovider -m gpu"
rows="^(ours|vLLM|floor|CLAIM|tokens|WROTE)|Error"
for name in "$@"; do
  case $name in
    sweep) step sweep 90 "GB/s" python3 -m benchmarks.copy_sweep ;;
    kernels) step kernels 60 "passed|failed|^E " $py tests/gpu/test_batch.py ;;
    sparse-kernels) step sparse-kernels 120 "passed|failed|^E " $py tests/gpu/test_sparse.py ;;
    sparse) step sparse 300 "^(diff|apply|push|check|vers)|$rows" \
      python3 -m benchmarks.sparse_gpu --shape 8b --out "$out/b" ;;
    8b) step ipc-8b 260 "$rows" python3 -m benchmarks.ipc_gpu --shape 8b --llm --out "$out/b" ;;
    moe) step ipc-moe 280 "$rows" \
      python3 -m benchmarks.ipc_gpu --shape 30b-a3b --layers 28 --slow-rounds 4 --out "$out/b" ;;
    both) # on two GPUs, side by side
      CUDA_VISIBLE_DEVICES=0 step ipc-8b 190 "$rows" \
        python3 -m benchmarks.ipc_gpu --shape 8b --out "$out/b" &
      CUDA_VISIBLE_DEVICES=1 step ipc-moe 200 "$rows" \
        python3 -m benchmarks.ipc_gpu --shape 30b-a3b --layers 28 --slow-rounds 4 --out "$out/b" &
      wait ;;
    peer) step peer 170 "$rows" python3 -m benchmarks.peer_gpu --out "$out/b" ;;
    bridge) step bridge 400 "passed|failed|^E " $py tests/gpu/test_bridge.py ;;
    bridge-8b) step bridge-8b 400 "$rows" python3 -m benchmarks.bridge_gpu --shape 8b --out "$out/b" ;;
    bridge-own) step bridge-own 300 "$rows" \
      python3 -m benchmarks.bridge_gpu --shape tiny --own-segments --out "$out/b" ;;
    engine) step engine 240 "passed|failed|version 1|^E " $py -s tests/gpu/test_engine.py ;;
  esac
done
