"""`vllm-wt bench`: pushes beside vLLM's own reload and a bare copy, a process for each size."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_wt_plugin import bench
from vllm_wt_plugin.errors import RequestError, TransferError, UnsupportedVLLM

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
LIMIT_S = 3600.0


def parameters(size: str) -> int:
    """ "10M" → 10,000,000. Raises RequestError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", size.strip().upper())
    number = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if not 10**6 <= number <= 10**11:
        raise RequestError(
            f"{size!r} is no model size from 1M to 100B", next_step="say 10M, or 10M,100M,1B"
        )
    return number


def measure(size: int, rounds: int) -> dict[str, Any]:
    """`bench.measure` in a process of its own, which vLLM does not give its memory back in."""
    if importlib.util.find_spec("vllm") is None:
        raise UnsupportedVLLM(
            "the benchmark runs vLLM, which is not installed here",
            next_step="pip install 'vllm_wt_plugin[cpu]', or run it where vLLM is",
        )
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "found.json", Path(folder) / "log"
        command = [sys.executable, "-m", bench.__name__, str(size), str(rounds), str(file)]
        with log.open("wb") as out:
            done = subprocess.run(  # noqa: S603  our own module
                command, stdout=out, stderr=out, env=os.environ | bench.ENV, timeout=LIMIT_S,
                check=False,
            )  # fmt: skip
        if done.returncode:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise TransferError(
                f"the run with {size:,} parameters ended with code {done.returncode}: "
                f"{lines[-1] if lines else 'it said nothing'}",
                next_step="look for free memory: it takes about five times the weights",
            )
        found: dict[str, Any] = json.loads(file.read_text())
    return found


def ratio(found: dict[str, Any], row: str, to: str) -> float:
    """How many times as long as the row `to`: the median over rounds of their ratios."""
    rows = found["rows"]
    return float(statistics.median(a / b for a, b in zip(rows[row], rows[to], strict=True)))


def lines(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Rows of a table: what, milliseconds, times memcpy, times faster than vLLM's reload."""
    return [
        (
            row,
            f"{statistics.median(ms):,.2f}",
            f"{ratio(found, row, bench.COPY):.2f}",
            f"{ratio(found, bench.RELOAD, row):.2f}",
        )
        for row, ms in found["rows"].items()
    ]
