"""A trainer for toy replicas, in a process of its own: `python -m tests.support.toy_trainer`.

    URLS SEED TIMEOUT_S FAULT      FAULT: none, or kill:N, stop:N, leave:N (exit) at the N-th tensor

Prints what a push raised, or `pushed`; the exit code is the interpreter's own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.support.toy_replica import weights
from vllm_wt_plugin import WeightSync, WeightSyncError
from vllm_wt_plugin.trainer.source import MappingSource

BUFFER = 1200  # bytes: a few tensors


class Faulty(MappingSource):
    """Walks its tensors like one that gathers, and does something else at the N-th."""

    fault = "none"

    def memory(self) -> None:
        return None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        what, _, at = self.fault.partition(":")
        for i, pair in enumerate(super().__iter__()):
            if at == str(i):
                print("there", flush=True)
                if what == "leave":
                    sys.exit(7)
                signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
                os.kill(os.getpid(), signals[what])
            yield pair


def start(urls: list[str], seed: int, timeout_s: float, fault: str) -> subprocess.Popen[str]:
    """The process; its standard output says how it went."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.support.toy_trainer", ",".join(urls), str(seed),
         str(timeout_s), fault],
        cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def main(urls: str, seed: str, timeout_s: str, fault: str) -> None:
    source = Faulty(weights(int(seed)))
    source.fault = fault
    sync = WeightSync(
        urls.split(","), backend="nccl", buffer_bytes=BUFFER, timeout_s=float(timeout_s),
        rendezvous_s=20, owner="a process",
    )  # fmt: skip
    try:
        sync.push(source, version=f"process {seed}")
    except WeightSyncError as exc:
        print(f"{type(exc).__name__}: {exc}", flush=True)
        source.fault = "none"
        sync.push(source, version=f"process {seed}")
    print("pushed", flush=True)
    # Not closed: the interpreter must get out of a group by itself.


if __name__ == "__main__":
    main(*sys.argv[1:])
