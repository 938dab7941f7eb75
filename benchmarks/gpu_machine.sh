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
echo "export PYTHONPATH=$site:$root\${PYTHONPATH:+:\$PYTHONPATH} VLLM_PLUGINS=wt"
