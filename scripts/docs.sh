#!/usr/bin/env bash
# Builds the site into site/, warnings are errors. Needs no vLLM and no torch: the API pages are read, not imported.
#     scripts/docs.sh                   PYTHON=python3.12 scripts/docs.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=$PWD/.venv-docs
current=$(sha256sum pyproject.toml)
if [[ ! -f $VENV/stamp || $(<"$VENV/stamp") != "$current" ]]; then
    "${PYTHON:-python3}" -m venv --clear "$VENV"
    # The packages of the extra `docs` alone, without those of the package itself.
    mapfile -t packages < <("$VENV/bin/python" - <<'PY'
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")
PY
    )
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${packages[@]}" 2>"$VENV/pip.log" || {
        echo "docs: pip failed; the log is .venv-docs/pip.log" >&2
        exit 1
    }
    echo "$current" >"$VENV/stamp"
fi
export DISABLE_MKDOCS_2_WARNING=true NO_MKDOCS_2_WARNING=true
exec "$VENV/bin/python" -m mkdocs build --strict
