#!/usr/bin/env bash
# On the GPU machine: tests and both `ipc` benchmarks in one go; logs and results to $OUT.
#   bash benchmarks/run_ipc_gpu.sh BUNDLE_DIR STEP...
#   steps: sweep kernels sparse-kernels sparse-micro sparse 8b moe fp8 peer small fsdp nccl nccl-tests
#          several bridge-8b bridge-own one-copy doctor dropin
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
  grep -aE "$pattern" "$out/$name.log" | cut -c1-430 | tail -n 90
}
py="python3 -m pytest -q -p no:cacheprovider -m gpu"
said="passed|failed|push|opened|^E "
rows="^(ours|vLLM|floor|the same|phases|[0-9]+ layers|CLAIM|tokens|WROTE)|Error"
for name in "$@"; do
  case $name in
    sweep) step sweep 90 "GB/s" python3 -m benchmarks.copy_sweep ;;
    kernels) step kernels 60 "passed|failed|^E " $py tests/gpu/test_batch.py ;;
    sparse-kernels) step sparse-kernels 120 "passed|failed|^E " $py tests/gpu/test_sparse.py ;;
    sparse-micro)
      step sparse-micro 240 " ms" python3 -m benchmarks.sparse_micro
      step sparse-micro-01 60 " ms" python3 -m benchmarks.sparse_micro --share 0.001 --quick
      step sparse-micro-10 60 " ms" python3 -m benchmarks.sparse_micro --share 0.1 --quick ;;
    sparse) step sparse 300 "^(diff|accept|apply|push|check|vers)|$rows" \
      python3 -m benchmarks.sparse_gpu --shape 8b --profile --out "$out/b" ;;
    8b) step ipc-8b 330 "$rows" python3 -m benchmarks.ipc_gpu --shape 8b --llm --out "$out/b" ;;
    moe) step ipc-moe 430 "$rows" \
      python3 -m benchmarks.ipc_gpu --shape 30b-a3b --slow-rounds 4 --out "$out/b" ;;
    small) # correctness, side by side: nothing is timed
      step kernels 120 "$said" $py tests/gpu/test_batch.py &
      for kind in dense moe; do
        step "engine-$kind" 240 "$said" $py -s tests/gpu/test_engine.py -k "$kind" &
        step "bridge-$kind" 240 "$said" $py -s tests/gpu/test_bridge.py -k "$kind" &
      done
      wait ;;
    fp8) step fp8 240 "$rows" python3 -m benchmarks.fp8_gpu --out "$out/b" ;;
    peer) step peer 200 "$rows" python3 -m benchmarks.several_gpus --only ipc --out "$out/b" ;;
    fsdp) # one FSDP rank and one expert-parallel engine on every GPU
      n=$(nvidia-smi -L | wc -l)
      config=/tmp/wt-fsdp
      python3 -c "import pathlib; from benchmarks import shapes
shapes.folder('30b-a3b', pathlib.Path('$config'), layers=${FSDP_LAYERS:-12})"
      rm -rf "$config/out" # of an earlier call
      step fsdp 540 ": [0-9.]+ s$|^loss|ok:|FAILED|Error" python3 examples/fsdp_ep_ipc.py \
        --device cuda --ranks "$n" --config "$config/config.json" --out "$config/out"
      [ ! -e "$config/out/result.json" ] || step fsdp-result 60 "$rows" \
        python3 -m benchmarks.several_gpus --fsdp "$config/out/result.json" --out "$out/b" ;;
    nccl) step nccl 300 "$rows" python3 -m benchmarks.nccl_gpu --shape 8b --out "$out/b" ;;
    nccl-tests) step nccl-tests 400 "$said" $py -s tests/gpu/test_nccl.py ;;
    several) step several 330 "$rows" python3 -m benchmarks.several_gpus --out "$out/b" ;;
    bridge-8b) step bridge-8b 200 "$rows" python3 -m benchmarks.bridge_gpu --shape 8b --out "$out/b" ;;
    dropin) step dropin 400 "passed|failed|^E " $py tests/gpu/test_dropin.py ;;
    one-copy) step one-copy 300 "^ +([0-9]+|end) |ok:|FAILED|Error" \
      python3 examples/one_copy_training.py --out "$out/one-copy" ;;
    doctor) step doctor 120 "." python3 -m vllm_wt_plugin.cli doctor ;;
    bridge-own) step bridge-own 120 "$rows" \
      python3 -m benchmarks.bridge_gpu --shape tiny --own-segments --out "$out/b" ;;
  esac
done
