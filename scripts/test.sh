#!/usr/bin/env bash
# setup, ruff, mypy, pytest; then how long each took. Exit code 1 if any of them failed.
#     scripts/test.sh [pytest's -m expression, by default "not full and not drill and not gpu"]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

marks=${1:-not full and not drill and not gpu}
python=.venv/bin/python
summary=()
failed=0

stage() { # name, command...: a failure is kept for the end, so that one run shows all of them
    local name=$1 start=$SECONDS outcome=ok
    shift
    echo "== $name"
    "$@" || { outcome=FAILED failed=1; }
    summary+=("$(printf '%-8s %5d s  %s' "$name" $((SECONDS - start)) "$outcome")")
}

stage setup scripts/setup.sh
if ((failed)); then exit 1; fi
stage lint "$python" -m ruff check .
stage format "$python" -m ruff format --check .
stage mypy "$python" -m mypy --strict vllm_wt_plugin examples
# Two at a time: tests wait for servers and leases more than they compute. A file stays on one.
stage pytest "$python" -m pytest -m "$marks" -n 2 --dist loadfile --durations=20

echo "== stages"
printf '%s\n' "${summary[@]}"
exit "$failed"
