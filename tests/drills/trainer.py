"""A trainer that pushes one version after another until SIGTERM, in a process that may be killed.

Says {"begun": n}, then {"done": n, "failed": {url: error}} of every push.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch

from tests.drills.load import Model
from tests.support import toy_replica
from tests.support.forked import forked
from tests.support.trainer import BUFFER
from vllm_wt_plugin import WeightSync, WeightSyncError

TIMEOUT_S = 8.0
REST_S = 0.15  # between two pushes: the optimiser's step
Tensors = dict[str, torch.Tensor]


class Toy:
    """The toy replicas' tensors, as `Model` has a real model's."""

    def __init__(self) -> None:
        self.tensors = toy_replica.weights(0)

    def become(self, version: int) -> None:
        for name, t in toy_replica.weights(version).items():
            self.tensors[name].copy_(t)


def model(kind: str) -> Model | Toy:
    return Toy() if kind == "toy" else Model()


class Trainer:
    """The process, and what it says; `first`: the version it begins with."""

    def __init__(self, kind: str, urls: Sequence[str], first: int, way: str) -> None:
        self.says, mouth = multiprocessing.Pipe(duplex=False)
        self._process = forked(_push, mouth, kind, list(urls), first, way)
        mouth.close()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid or 0, number)

    def wait(self) -> int:
        """Until it has ended: the exit code."""
        self._process.join(60)
        return self._process.exitcode or 0

    def kill(self) -> None:
        """Idempotent."""
        self._process.kill()
        self._process.join(20)


def _push(mouth: Connection, kind: str, urls: list[str], first: int, way: str) -> None:
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    torch.set_num_threads(1)
    held, version = model(kind), first
    packed = {"packed": True, "buffer_bytes": BUFFER} if way == "packed" else {}
    with WeightSync(urls, timeout_s=TIMEOUT_S, owner=f"trainer {first}", **packed) as sync:
        while not ended:
            held.become(version)
            mouth.send({"begun": version})
            failed: dict[str, str] = {}
            try:
                sync.push(held.tensors, version, mode="sparse" if version % 4 else "dense")
            except WeightSyncError as exc:
                if exc.report is None:
                    raise
                errors = {r.name: r.error for r in exc.report.replicas if r.error is not None}
                failed = {n: f"{type(e).__name__}: {e}" for n, e in errors.items()}
            mouth.send({"done": version, "failed": failed})
            version += 1
            time.sleep(REST_S)
