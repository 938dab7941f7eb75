"""Several GPUs: how a push falls with the number of workers, over `ipc` and over `nccl`.

    python -m benchmarks.several_gpus --out benchmarks/results [--shape 8b] [--rounds 12]
        [--only ipc|nccl]
    python -m benchmarks.several_gpus --fsdp result.json --out benchmarks/results

The trainer is this process, on GPU 0. Over `ipc` TP=1 runs on GPU 1 and TP=2, 4, … on the first
2, 4, … GPUs, the trainer's among them: each worker pulls its part. Over `nccl`, where a GPU takes
one rank, the engines have the GPUs 1, 2, …; vLLM's own `nccl` backend runs beside ours (its `ipc`
serves the GPU of its trainer alone). At the largest TP one sparse push of 1 %. `--fsdp`:
no more than to write down what `examples/fsdp_ep_ipc.py --out` measured on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.ipc_gpu import ours, their_source, timed
from benchmarks.nccl_gpu import floors
from benchmarks.result import Result
from benchmarks.sparse_gpu import Flips
from vllm_wt_plugin import WeightSync, as_source

PORT = 8130
MEMORY = 0.2
WORDS = {2: "two", 4: "four"}  # in the result's name


def pulled_floor_ms(nbytes: int, workers: int) -> list[float]:
    """Copies of what the workers pull from GPU 0, all at once: one on GPU 1 takes all of it, more
    take a part each, the first on GPU 0 itself. All that goes elsewhere leaves by GPU 0's link."""
    part, gpus = nbytes // workers, [1] if workers == 1 else list(range(workers))
    here = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
    parts = here[: part * workers].chunk(workers)
    there = [torch.empty(part, dtype=torch.uint8, device=f"cuda:{i}") for i in gpus]
    streams = [torch.cuda.Stream(0) for _ in gpus]  # torch copies on a stream of the source

    def copy() -> None:
        for stream, mine, its in zip(streams, parts, there, strict=True):
            with torch.cuda.stream(stream):
                its.copy_(mine, non_blocking=True)
        for stream in streams:
            stream.synchronize()

    return timed(copy, 10)


def fsdp(found: dict[str, Any], result: Result) -> None:
    """What the example found: seconds by phase, and how many of its engines' answers are, bit for
    bit, those of a vLLM that loaded the trainer's checkpoint."""
    result.facts |= {"axis": "milliseconds of each phase"}
    result.facts |= {k: found[k] for k in ("ranks", "layers")}
    for phase, s in found["seconds"].items():
        result.add(phase, [s * 1e3])
    result.claim(
        "answers that are a fresh vLLM's, bit for bit", found["equal"], found["answers"],
        at_least=True,
    )  # fmt: skip


def widths(gpus: int) -> list[int]:
    """1, 2, 4, … workers."""
    return [1 << i for i in range(gpus.bit_length()) if 1 << i <= gpus]


class Bench:
    """The trainer's model and the engines of one backend after another."""

    def __init__(self, a: Any, result: Result) -> None:
        self.a, self.result, self.gpus = a, result, torch.cuda.device_count()
        self.folder = shapes.folder(a.shape, Path("/tmp/wt-bench-several"), layers=a.layers)
        self.model = shapes.trainer_model(self.folder, "cuda:0")
        self.small = [p for p in self.model.parameters() if p.dim() == 1]
        self.start = [p.clone() for p in self.small]
        specs = as_source(self.model).specs()
        self.nbytes = sum(s.nbytes for s in specs)
        result.facts |= {"tensors": len(specs), "bytes": self.nbytes, "gpus": self.gpus}
        self.tokens: dict[str, list[int]] = {}
        self.ports = iter(range(PORT, PORT + 40))

    def step(self) -> None:
        """New weights, cheaply."""
        torch._foreach_mul_(self.small, 1.001)

    def measured(
        self, places: dict[str, tuple[str, str, tuple[int, ...]]], measure: Callable[..., None]
    ) -> None:
        """Start an engine for each {row: (label, backend, GPUs)}, all at once, then measure each
        and ask it for tokens of the first weights."""
        with ExitStack() as stack:
            up = {}
            for row, (_, backend, gpus) in places.items():
                port = next(self.ports)
                log = Path(f"/tmp/several-{port}.log")
                url = engines.server(
                    self.folder, backend, port, log, memory=MEMORY,
                    gpus=",".join(map(str, gpus)),
                    args=("--tensor-parallel-size", str(len(gpus))),
                )  # fmt: skip
                up[row] = stack.enter_context(url), log
            for url, log in up.values():
                engines.wait_ready(url, log)
            for row, (label, backend, gpus) in places.items():
                measure(row, up[row][0], backend, len(gpus))
                self.tokens[f"{label} {backend}"] = engines.tokens(up[row][0])
                self.result.write(self.a.out)

    def ipc(self) -> None:
        """Trainer on GPU 0; every worker pulls over the link what it needs."""
        places = {
            f"ours ipc, TP={k}": (f"TP={k}", "ipc", (1,) if k == 1 else tuple(range(k)))
            for k in widths(self.gpus)
        }
        for k in widths(self.gpus):
            self.result.add(f"floor: copies to TP={k}", pulled_floor_ms(self.nbytes, k))
        torch.cuda.empty_cache()
        self.measured(places, self.ipc_push)
        rows = [self.result.median(row) for row in places]
        for k, ms in zip(widths(self.gpus), rows, strict=True):
            aim = 1.15 * self.result.median(f"floor: copies to TP={k}") + 5
            self.result.claim(f"push ipc, TP={k}, ms", ms, aim)
        self.result.claim(f"ipc, TP={widths(self.gpus)[-1]} faster than TP=1",
                          rows[0] / rows[-1], 1, at_least=True)  # fmt: skip

    def ipc_push(self, row: str, url: str, backend: str, k: int) -> None:
        ours(self.result, row, url, self.model, self.a.rounds, self.step)
        torch._foreach_copy_(self.small, self.start)
        with WeightSync(url) as sync:
            sync.push(self.model)
            ok = sync.verify().ok
            if k == widths(self.gpus)[-1]:
                ok = self.sparse(sync, k) and ok
            sync.push(self.model)
        self.result.claim(f"verified, ipc, TP={k}", float(ok), 1, at_least=True)

    def sparse(self, sync: WeightSync, k: int) -> bool:
        """1 % of all elements change, there and back; whether the last state is the trainer's."""
        flips, reports = Flips(self.model, 0.01), []
        sync.push(self.model, mode="sparse")  # keeps the copy that the next ones compare with
        self.result.add(
            f"ours sparse 1 %, TP={k}",
            timed(lambda: reports.append(sync.push(self.model, mode="sparse")), 5, flips.flip),
        )
        row = [{**r.seconds, **r.replicas[0].seconds} for r in reports[1:]]
        self.result.add_phases(
            f"ours sparse 1 %, TP={k}", [{n: s * 1e3 for n, s in r.items()} for r in row]
        )
        self.result.facts["sparse: elements changed"] = reports[-1].changed
        return sync.verify().ok

    def nccl(self) -> None:
        """Trainer on GPU 0, engines on the others: ours and vLLM's own."""
        floors(self.result, self.nbytes)
        torch.cuda.empty_cache()
        mine, theirs = {}, {}
        for k in widths(self.gpus - 1):
            gpus = tuple(range(1, k + 1))
            mine[f"ours nccl, TP={k}"] = (f"TP={k}", "nccl", gpus)
            theirs[f"vLLM nccl, TP={k}"] = (f"TP={k}", "upstream_nccl", gpus)
        self.measured(mine | theirs, self.nccl_push)
        for a, b, k in zip(mine, theirs, widths(self.gpus - 1), strict=True):
            faster = self.result.median(b) / self.result.median(a)
            self.result.claim(f"faster than vLLM's nccl, TP={k}", faster, 3, at_least=True)
            aim = 1.1 * self.result.median("floor: one broadcast") + 5
            self.result.claim(f"push nccl, TP={k}, ms", self.result.median(a), aim)

    def nccl_push(self, row: str, url: str, backend: str, k: int) -> None:
        if backend == "upstream_nccl":
            return self.their_push(row, url, k)
        push = partial(ours, self.result, row, url, self.model, self.a.rounds, self.step)
        push(backend="nccl")
        torch._foreach_copy_(self.small, self.start)
        with WeightSync(url, backend="nccl") as sync:
            sync.push(self.model)

    def their_push(self, row: str, url: str, k: int) -> None:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )
        from vllm.utils.network_utils import get_open_port

        info = NCCLTrainerInitInfo(
            rank=0, master_address="127.0.0.1", master_port=get_open_port(), world_size=k + 1
        )
        engine = NCCLTrainerWeightTransferEngine.trainer_init(
            info, client=HTTPVLLMWeightSyncClient(url), source=their_source(self.model)
        )
        self.result.add(row, timed(engine.send_weights, self.a.slow_rounds, self.step))
        torch._foreach_copy_(self.small, self.start)
        engine.send_weights()

    def same_tokens(self) -> None:
        """Where an engine of vLLM's own was given the same weights, ours must say what it says."""
        self.result.facts["tokens"] = self.tokens
        for name, tokens in self.tokens.items():
            label, backend = name.split()
            theirs = self.tokens.get(f"{label} upstream_nccl")
            if theirs is not None and backend != "upstream_nccl":
                same = float(tokens == theirs)
                self.result.claim(f"tokens as vLLM's own, {name}", same, 1, at_least=True)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--shape", choices=shapes.SHAPES, default="8b")
    ap.add_argument("--layers", type=int)
    ap.add_argument("--rounds", type=int, default=12)
    ap.add_argument("--slow-rounds", type=int, default=5, help="of vLLM's own backend")
    ap.add_argument("--only", choices=("ipc", "nccl"))
    ap.add_argument("--fsdp", type=Path, help="result.json of the example")
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise SystemExit(f"needs two GPUs or more, and sees {gpus}")
    name = f"{WORDS.get(gpus, gpus)}-gpus"
    if a.fsdp:
        result = Result(f"{name}-fsdp")
        fsdp(json.loads(a.fsdp.read_text()), result)
        print("WROTE", result.write(a.out), flush=True)
        return
    result = Result(f"{name}-{a.only}" if a.only else name)
    bench = Bench(a, result)
    if a.only != "nccl":
        bench.ipc()
    if a.only != "ipc":
        bench.nccl()
    bench.same_tokens()
    print("WROTE", result.write(a.out), flush=True)


if __name__ == "__main__":
    main()
