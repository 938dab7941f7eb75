"""`nccl` between two GPUs: our push against vLLM's own backend and a bare broadcast, in one run.

    python -m benchmarks.nccl_gpu --out benchmarks/results [--shape 8b] [--rounds 12] [--only ours]

The trainer is this process, with a transformers model on GPU 0; the engines are servers on GPU 1
with dummy weights, one after the other. `floor` broadcasts one buffer of as many bytes, in a group
of the same kind with a process on GPU 1. Times in ms, weights live at the end of each push.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.gpu_memory import MemoryPeak
from benchmarks.ipc_gpu import ours, their_source, timed
from benchmarks.result import Result
from benchmarks.sparse_gpu import Flips
from vllm_wt_plugin import WeightSync, as_source
from vllm_wt_plugin.trainer.meeting import GroupOptions
from vllm_wt_plugin.transport.backends import Member
from vllm_wt_plugin.transport.group import Group, join, listen

ROUNDS = 10  # of the floor


def broadcasts(group: Group, buffer: torch.Tensor, rounds: int, each: int) -> list[float]:
    """Milliseconds of each broadcast of the whole buffer, so many bytes at a time, after a
    warm-up."""

    def once() -> None:
        for part in buffer.split(each):
            pending = group.broadcast(part, 60)
        while not pending.done():
            time.sleep(1e-4)

    return timed(once, rounds)


def meet(port: int, key: str, rank: int, store: Any) -> Group:
    at = Member(host="127.0.0.1", port=port, group=key, rank=rank, world_size=2)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return join(at, device, 120, threading.Event(), store)


def peer(port: str, key: str, nbytes: str) -> None:
    """The other end of the floor, in a process of its own."""
    group = meet(int(port), key, 1, None)
    buffer = torch.empty(int(nbytes), dtype=torch.uint8, device="cuda:1")
    for each in (len(buffer), GroupOptions.buffer_bytes):
        broadcasts(group, buffer, ROUNDS, each)
    group.close()


def floors(result: Result, nbytes: int) -> None:
    """As many bytes in one broadcast, and in as many as a push takes."""
    store, key = listen("127.0.0.1"), secrets.token_hex(16)
    command = [sys.executable, "-m", "benchmarks.nccl_gpu", "--peer", str(store.port), key]
    process = subprocess.Popen([*command, str(nbytes)])
    try:
        group = meet(store.port, key, 0, store)
        buffer = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
        result.add("floor: one broadcast", broadcasts(group, buffer, ROUNDS, nbytes))
        each = GroupOptions.buffer_bytes
        row = f"the same, {each >> 20} MiB at a time"
        result.add(row, broadcasts(group, buffer, ROUNDS, each))
        process.wait(60)
        group.close()
    finally:
        process.kill()
    torch.cuda.empty_cache()


def theirs(result: Result, row: str, url: str, model: Any, rounds: int, step: Any) -> None:
    """vLLM's own trainer class and engine, packed with its defaults."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )
    from vllm.utils.network_utils import get_open_port

    info = NCCLTrainerInitInfo(
        rank=0, master_address="127.0.0.1", master_port=get_open_port(), world_size=2
    )
    with MemoryPeak(1) as worker:
        engine = NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=HTTPVLLMWeightSyncClient(url), source=their_source(model)
        )
        engines.check_pynccl(engine.model_update_group)
        engine.send_weights()
    result.add(row, timed(engine.send_weights, rounds, step))
    result.facts[f"{row}: MiB on the worker's GPU"] = worker.above >> 20
    engine.model_update_group.destroy()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--shape", choices=shapes.SHAPES, default="8b")
    ap.add_argument("--layers", type=int)
    ap.add_argument("--rounds", type=int, default=12)
    ap.add_argument("--slow-rounds", type=int, default=6, help="of vLLM's own backend")
    ap.add_argument("--only", choices=("ours",), help="leave vLLM's own backend out")
    ap.add_argument("--peer", nargs=3, help=argparse.SUPPRESS)
    ap.add_argument("--out", type=Path)
    a = ap.parse_args()
    if a.peer:
        return peer(*a.peer)
    if a.out is None or torch.cuda.device_count() < 2:
        raise SystemExit("needs --out, and two GPUs")
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    folder = shapes.folder(a.shape, Path(f"/tmp/wt-bench-nccl-{a.shape}"), layers=a.layers)
    model = shapes.trainer_model(folder, "cuda:0")
    specs = as_source(model).specs()
    nbytes = sum(s.nbytes for s in specs)
    result = Result(f"nccl-gpu-{a.shape}", facts={"bytes": nbytes, "tensors": len(specs)})
    floors(result, nbytes)
    small = [p for p in model.parameters() if p.dim() == 1]
    start = [p.clone() for p in small]

    def step() -> None:  # new weights each round, cheaply
        torch._foreach_mul_(small, 1.001)

    tokens = {}
    for i, backend in enumerate(("nccl",) if a.only else ("nccl", "upstream_nccl")):
        log = Path(f"/tmp/{backend}-{a.shape}.log")
        with engines.server(folder, backend, 8120 + i, log, memory=0.4, gpus="1") as url:
            engines.wait_ready(url, log)
            torch._foreach_copy_(small, start)
            if backend == "nccl":
                measure(result, url, model, a.rounds, step)
            else:
                theirs(result, "vLLM nccl packed", url, model, a.slow_rounds, step)
            torch._foreach_copy_(small, start)
            if backend == "nccl":
                with WeightSync(url, backend="nccl", verify="full") as sync:
                    sync.push(model)
                    result.claim("every checksum agrees", sync.verify().ok, 1, at_least=True)
            else:
                theirs_again(url, model)
            tokens[backend] = engines.tokens(url)
        result.write(a.out)
    print("tokens", tokens, flush=True)
    if not a.only:
        same = tokens["nccl"] == tokens["upstream_nccl"]
        result.claim("same tokens as vLLM's own nccl", float(same), 1, at_least=True)
        faster = result.median("vLLM nccl packed") / result.median("ours")
        result.claim("faster than vLLM's nccl", faster, 3, at_least=True)
    claims(result)
    print("WROTE", result.write(a.out), flush=True)


def theirs_again(url: str, model: Any) -> None:
    """The same weights as ours at the end, so that tokens can be compared."""
    theirs(Result("unused"), "vLLM nccl, once more", url, model, 1, lambda: None)


def measure(result: Result, url: str, model: Any, rounds: int, step: Any) -> None:
    # Apart from what is timed: sampling takes the driver's lock.
    with MemoryPeak(1) as worker, WeightSync(url, backend="nccl") as sync:
        sync.push(model)
    ours(result, "ours", url, model, rounds, step, backend="nccl")
    result.facts["ours: MiB on the worker's GPU"] = worker.above >> 20
    rows = (
        ("ours, every checksum compared", {"verify": "full"}),
        ("ours, none compared", {"verify": "off"}),
        ("ours, buffers of 64 MiB", {"buffer_bytes": 64 << 20}),
        ("ours, buffers of 256 MiB", {"buffer_bytes": 256 << 20}),
        ("ours, buffers of 1 GiB", {"buffer_bytes": 1 << 30}),
    )
    for row, options in rows:
        ours(result, row, url, model, rounds, step, backend="nccl", **options)
    sparse(result, url, model, rounds)


def sparse(result: Result, url: str, model: Any, rounds: int) -> None:
    """One broadcast of what has changed: another percent of the elements each round."""
    flips = Flips(model, 0.01)
    with WeightSync(url, backend="nccl") as sync:
        sync.push(model, mode="sparse")
        reports: list[Any] = []
        push = partial(sync.push, model, mode="sparse")
        result.add("ours, 1 % changed", timed(lambda: reports.append(push()), rounds, flips.flip))
        phases = [{**r.seconds, **r.replicas[0].seconds} for r in reports[1:]]
        result.add_phases("ours, 1 % changed", [{n: s * 1e3 for n, s in p.items()} for p in phases])
        result.claim("sparse: every checksum agrees", sync.verify(model).ok, 1, at_least=True)


def claims(result: Result) -> None:
    push = result.median("ours")
    limit = 1.1 * result.median("floor: one broadcast") + 5
    result.claim("push, ms", push, limit)
    # NCCL's own buffers and the context of its channels come on top of ours.
    aim = (2 * GroupOptions.buffer_bytes >> 20) + 1024
    result.claim("extra memory, worker, MiB", result.facts["ours: MiB on the worker's GPU"], aim)
    mib = result.facts["ours memory MiB"]["first push"]
    result.claim("extra memory, trainer, MiB", mib, aim)


if __name__ == "__main__":
    main()
