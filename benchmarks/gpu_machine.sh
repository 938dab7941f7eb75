#!/usr/bin/env bash
# On an offline GPU machine: eval "$(bash benchmarks/gpu_machine.sh BUNDLE_DIR)"
# Unpacks vLLM from the bundle, adds the wheels beside it, and makes this source tree importable
# with its entry points (pip and hatchling would need a package index).
set -euo pipefail
bundle=$1
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$bundle/install_bundle.sh" "$bundle"
site=/tmp/wt_site
dist=$site/vllm_wt_plugin-0.1.0.dist-info
mkdir -p "$dist"
ln -sfn "$root/vllm_wt_plugin" "$site/vllm_wt_plugin"
printf 'Metadata-Version: 2.1\nName: vllm_wt_plugin\nVersion: 0.1.0\n' >"$dist/METADATA"
python3 - "$root/pyproject.toml" >"$dist/entry_points.txt" <<'PY'
import sys, tomllib
groups = tomllib.load(open(sys.argv[1], "rb"))["project"]["entry-points"]
for group, points in groups.items():
    print(f"[{group}]")
    for name, target in points.items():
        print(f"{name} = {target}")
PY
for wheel in "$bundle"/wheels/*.whl; do
  [ -e "$wheel" ] && python3 -m zipfile -e "$wheel" "$site"
done
# vLLM's PyNccl turns itself off, in silence, where NCCL lacks two functions of 2.29.7 that only its
# sleep calls: its own nccl backend then broadcasts nothing. Give it torch's NCCL with both.
nccl=$(python3 -c 'import nvidia.nccl as n; print(list(n.__path__)[0] + "/lib/libnccl.so.2")' || true)
if [ -e "$nccl" ]; then
  python3 -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1]).ncclCommSuspend' "$nccl" 2>/dev/null || {
    echo 'int ncclCommSuspend(void *c, int f) { return 5; } int ncclCommResume(void *c) { return 5; }' |
      gcc -shared -fPIC -o "$site/libnccl_with.so" -x c - -x none \
        -Wl,--no-as-needed,-rpath,"$(dirname "$nccl")" "$nccl"
    nccl=$site/libnccl_with.so
  }
  echo "export VLLM_NCCL_SO_PATH=$nccl"
fi
echo "export PYTHONPATH=$site:$root\${PYTHONPATH:+:\$PYTHONPATH} VLLM_PLUGINS=wt"
