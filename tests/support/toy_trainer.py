"""A trainer for toy replicas, in a process of its own: `python -m tests.support.toy_trainer`.

    URLS SEED TIMEOUT_S FAULT      FAULT: none, or kill:N, stop:N, leave:N (exit) at the N-th tensor
                                   or sharded:RANK:PORT, one of two ranks that gather, or
                                   patches: killed at the first bucket of a sparse push

Prints what a push raised, or `pushed`; the exit code is the interpreter's own.
"""

from __future__ import annotations

import faulthandler
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
STACKS_S = 30  # one that hangs says where, before its test gives up


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


def sharded(urls: list[str], seed: int, rank: int, port: int) -> None:
    """FSDP2's tensors: both ranks push, one of them sends; a refused push leaves both in step."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    tensors = {
        n: distribute_tensor(t, mesh, [Shard(0)]) if t.dim() else t
        for n, t in weights(seed).items()
    }
    with WeightSync(urls, backend="nccl", buffer_bytes=BUFFER, timeout_s=20) as sync:
        try:
            sync.push(tensors | {"extra": tensors[next(iter(tensors))]})
        except WeightSyncError as exc:
            print(f"{type(exc).__name__}", flush=True)
        total = torch.ones(1)
        dist.all_reduce(total)
        report = sync.push(tensors, version="sharded")
        dist.all_reduce(total)
    print(f"{int(total)} pushed to {len(report.replicas)}", flush=True)
    dist.destroy_process_group()


def dies_with_patches(urls: list[str], seed: int) -> None:
    from vllm_wt_plugin.transport.nccl import Sender

    def dies(*_: object) -> None:
        print("there", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

    tensors = weights(seed)
    sync = WeightSync(urls, backend="nccl", owner="a process")
    sync.push(tensors, version=f"process {seed}", mode="sparse")
    print("pushed", flush=True)
    Sender.send = dies  # type: ignore[assignment]
    for t in tensors.values():
        t.zero_()
    sync.push(tensors, mode="sparse")


def main(urls: str, seed: str, timeout_s: str, fault: str) -> None:
    faulthandler.dump_traceback_later(STACKS_S, repeat=True)
    if fault.startswith("sharded:"):
        return sharded(urls.split(","), int(seed), *map(int, fault.split(":")[1:]))
    if fault == "patches":
        return dies_with_patches(urls.split(","), int(seed))
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
