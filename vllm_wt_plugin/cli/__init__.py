"""`vllm-wt`: serve, push, status, verify, doctor, bench.

    app (arguments) → serve | push | doctor | bench → show (tables, bars, or JSON) → exit code

Exit codes, the same for every command (`exits.py`):

    0  done                              4  the replica cannot do it now (dirty, asleep, busy)
    1  looked, and found a problem       5  a server cannot be reached
    2  the command line is wrong         6  a transfer failed, or this vLLM is not supported
    3  refused: does not fit, no right
"""

from __future__ import annotations

import sys

MISSING = """\
vllm-wt needs typer and rich for its tables and progress bars, and {name} is not installed.
The rest of vllm_wt_plugin works without them. Install them with:

    pip install 'vllm_wt_plugin[cli]'
"""


def main() -> None:
    """The entry point of `vllm-wt`."""
    try:
        from vllm_wt_plugin.cli.app import app
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] not in ("typer", "rich"):
            raise
        sys.stderr.write(MISSING.format(name=exc.name))
        sys.exit(2)
    app()
