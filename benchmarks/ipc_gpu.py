"""`ipc` on one GPU: our push against vLLM's own backend and a plain copy, in one run.

    python -m benchmarks.ipc_gpu --shape 8b --out benchmarks/results [--llm] [--rounds 12]

The trainer is this process, with a transformers model on the GPU; the engines are processes of
their own on the same GPU, with dummy weights, as many at a time as fit. Each row is the time of one
whole push as the trainer sees it, weights live at its end. Times in ms; `floor` copies the same
bytes buffer to buffer on the device. An MoE has as many layers as two copies of it fit.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.gpu_memory import MemoryPeak, leaks
from benchmarks.result import Result
from vllm_wt_plugin import WeightSync, as_source

ENGINE = 4 << 30  # bytes an engine takes beside its weights: context, activations, KV cache
SPARE = 12 << 30  # of all engines and buffers beside two copies
MOE_LAYERS = (26, 28)  # at least 10,000 tensors; more would only take longer


def floor_ms(nbytes: int, rounds: int = 10) -> list[float]:
    """One buffer to another; what does not fit beside the models is copied in equal parts."""
    parts = -(-nbytes // (17 << 30))
    pair = [torch.empty(nbytes // parts, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def copy() -> None:
        for _ in range(parts):
            pair[1].copy_(pair[0])
        torch.cuda.synchronize()

    times = timed(copy, rounds)
    pair.clear()
    torch.cuda.empty_cache()
    return times


def timed(
    f: Callable[[], object], rounds: int, before: Callable[[], object] = lambda: None
) -> list[float]:
    """Milliseconds of each call after one warm-up; `before` runs untimed ahead of each."""
    out = []
    for i in range(rounds + 1):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if i:
            out.append((time.perf_counter() - start) * 1e3)
    return out


def ours(
    result: Result, row: str, target: Any, model: Any, rounds: int, step: Any,
    *, leak_rounds: int = 0, **options: Any,
) -> list[Any]:  # fmt: skip
    """Time our push, by phases; then its memory, and what `leak_rounds` more pushes leave."""
    reports: list[Any] = []
    with WeightSync(target, **options) as sync:
        with MemoryPeak() as first:
            reports.append(sync.push(model))
        print(f"{row}: first {reports[0]}", flush=True)
        result.add(row, timed(lambda: reports.append(sync.push(model)), rounds, step))
        phases = [{**r.seconds, **r.replicas[0].seconds} for r in reports[2:]]
        result.add_phases(row, [{n: s * 1e3 for n, s in r.items()} for r in phases])
        with MemoryPeak() as later:  # apart: its sampling takes the driver's lock
            for _ in range(5):
                sync.push(model)
        memory = {"first push": first.above >> 20, "later pushes": later.above >> 20}
        if leak_rounds:
            left = leaks(sync, model, leak_rounds)
            result.facts[f"{row}: MiB left by {leak_rounds} pushes"] = {
                k: round(v / 2**20, 2) for k, v in left.items()
            }
    result.facts[f"{row} memory MiB"] = memory
    print(row, {k: v for k, v in result.facts.items() if k.startswith(row)}, flush=True)
    return reports


def their_source(model: Any) -> Any:
    """What vLLM's own trainer engines send of it: the tensors that ours send."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    source = as_source(model)

    class Theirs(WeightSource):
        @functools.cached_property
        def metadata(self) -> list[ParamMeta]:  # a property in vLLM 0.33, a method before
            return [ParamMeta(s.name, getattr(torch, s.dtype), s.shape) for s in source.specs()]

        def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(source)

        __iter__ = iter_full  # vLLM 0.32's name for it

    return Theirs()


def upstream_trainer(client: Any, model: Any, packed: int) -> Any:
    """vLLM's own trainer engine; `packed` is the buffer's bytes, 0 for unpacked."""
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
    )

    more = {"packed_buffer_size_bytes": packed} if packed else {}
    info = IPCTrainerInitInfo(rank=0, packed=bool(packed), **more)
    source = their_source(model)
    return IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)


def upstream(
    result: Result, row: str, client: Any, model: Any, rounds: int, step: Any, packed: int
) -> None:
    """Time vLLM's own push."""
    engine = upstream_trainer(client, model, packed)
    result.add(row, timed(engine.send_weights, rounds, step))
    with MemoryPeak() as memory:
        engine.send_weights()
    result.facts[f"{row} memory MiB"] = {"later pushes": memory.above >> 20}
    torch.cuda.ipc_collect()
    torch.cuda.empty_cache()


class LLMCalls:
    """vLLM's client protocol on an LLM object."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self.llm.start_weight_update()

    def update_weights(self, update_info: Any) -> None:
        self.llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.llm.finish_weight_update()


class Bench:
    """The model, the engines beside it, and what is measured on each."""

    def __init__(self, a: Any, result: Result, layers: int) -> None:
        self.a, self.result = a, result
        self.folder = shapes.folder(a.shape, Path(f"/tmp/wt-bench-{a.shape}"), layers=layers)
        self.memory = {"tiny": 0.05, "8b": 0.17, "30b-a3b": 0.32}[a.shape]
        self.nbytes = copy = shapes.nbytes(a.shape, layers)
        # Engines that fit at once, beside the trainer's copy and the packed buffers.
        self.at_once = (torch.cuda.mem_get_info()[0] - copy - (4 << 30)) // (copy + ENGINE)
        self.buffer = 4 << 30 if self.at_once > 1 else 2 << 30
        print(f"{layers} layers, {copy / 1e9:.2f} GB; {self.at_once} engines at once", flush=True)

    def served(self, stack: ExitStack, backend: str) -> tuple[str, Path]:
        port = {"tiny": 8100, "8b": 8102, "30b-a3b": 8104}[self.a.shape] + (backend != "ipc")
        log = Path(f"/tmp/{backend}-{self.a.shape}.log")
        server = engines.server(self.folder, backend, port, log, memory=self.memory)
        return stack.enter_context(server), log

    def run(self) -> None:
        """Start early what fits, so that starts overlap; measure when all of that is up."""
        a = self.a
        self.result.add("floor: one device copy", floor_ms(self.nbytes))  # while there is room
        with ExitStack() as first, ExitStack() as second:
            up = [self.served(first, "ipc")]
            if self.at_once > 1:
                up.append(self.served(second, "upstream_ipc"))
            self.load()
            llm = self.llm("ipc") if a.llm and self.at_once > 2 else None
            for url, log in up:
                engines.wait_ready(url, log)
            tokens = self.ours_http(up[0][0])
            if llm is not None:
                self.ours_llm(llm)
            first.close()
            if self.at_once <= 1:
                up.append(self.served(second, "upstream_ipc"))
                engines.wait_ready(*up[1])
            same = tokens == self.upstream_http(up[1][0])
            self.result.facts["same tokens as vLLM's own reload"] = same
        if a.llm:
            if llm is None:
                self.ours_llm(self.llm("ipc"))
            self.upstream_llm()

    def load(self) -> None:
        self.model = shapes.trainer_model(self.folder, "cuda")
        self.small = [p for p in self.model.parameters() if p.dim() == 1]
        self.start = [p.clone() for p in self.small]
        specs = as_source(self.model).specs()
        layers = self.model.config.num_hidden_layers
        self.result.facts |= {
            "tensors": len(specs), "bytes": sum(s.nbytes for s in specs),
            "shape": self.a.shape, "layers": layers,
        }  # fmt: skip

    def step(self) -> None:
        """New weights, cheaply."""
        torch._foreach_mul_(self.small, 1.001)

    def llm(self, backend: str) -> Any:
        return engines.llm(self.folder, backend, memory=self.memory)

    def ours_http(self, url: str) -> list[int]:
        a = self.a
        push = functools.partial(ours, self.result, rounds=a.rounds, step=self.step)
        reports = push("ours, HTTP", url, self.model, leak_rounds=100)
        plan = reports[0].replicas[0].plan
        self.result.facts["plan"] = {
            "segments": plan.segments, "in place": plan.in_place,
            "processed": len(plan.processed), "opaque": len(plan.opaque),
        }  # fmt: skip
        row = "ours packed 2 x 1 GiB, HTTP"
        push(row, url, self.model, packed=True, buffer_bytes=1 << 30)
        with WeightSync(url) as sync:
            torch._foreach_copy_(self.small, self.start)
            sync.push(self.model)
        return engines.tokens(url)

    def ours_llm(self, llm: Any) -> None:
        ours(self.result, "ours, engine process", llm, self.model, self.a.rounds, self.step,
             leak_rounds=100)  # fmt: skip
        llm.llm_engine.engine_core.shutdown()

    def upstream_http(self, url: str) -> list[int]:
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

        client = HTTPVLLMWeightSyncClient(url)
        self.upstream_ways(client, "HTTP")
        torch._foreach_copy_(self.small, self.start)
        upstream_trainer(client, self.model, 0).send_weights()
        return engines.tokens(url)

    def upstream_llm(self) -> None:
        llm = self.llm("upstream_ipc")
        self.upstream_ways(LLMCalls(llm), "engine process")
        llm.llm_engine.engine_core.shutdown()

    def upstream_ways(self, client: Any, way: str) -> None:
        for mode, packed in (("unpacked", 0), (f"packed {self.buffer >> 30} GiB", self.buffer)):
            upstream(self.result, f"vLLM ipc {mode}, {way}", client, self.model,
                     self.a.slow_rounds, self.step, packed)  # fmt: skip


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    ap.add_argument("--layers", type=int)
    ap.add_argument("--rounds", type=int, default=12)
    ap.add_argument("--slow-rounds", type=int, default=10, help="of vLLM's own backend")
    ap.add_argument("--llm", action="store_true", help="also an LLM with its engine process")
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    os.environ |= {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    layers = a.layers or shapes.SHAPES[a.shape]["num_hidden_layers"]
    if a.shape == "30b-a3b" and a.layers is None:
        least, most = MOE_LAYERS
        free = torch.cuda.mem_get_info()[0] - SPARE
        layers = shapes.fitting(a.shape, free, 2, least=least, most=most)
    result = Result(f"ipc-gpu-{a.shape}")
    Bench(a, result, layers).run()
    claims(result, dense="a3b" not in a.shape)
    print("WROTE", result.write(a.out), flush=True)


def claims(result: Result, *, dense: bool) -> None:
    floor = result.median("floor: one device copy")
    for way, faster in (("HTTP", 12 if dense else 50), ("engine process", 8 if dense else 50)):
        if f"ours, {way}" not in result.rows:
            continue
        push = result.median(f"ours, {way}")
        limit = (1.25 if dense else 1.5) * floor + 5
        result.claim(f"push, {way}, ms", push, limit)
        theirs = (k for k in result.rows if k.startswith("vLLM") and k.endswith(way))
        best = min(map(result.median, theirs))
        result.claim(f"faster than vLLM's best ipc, {way}", best / push, faster, at_least=True)
        if way == "HTTP":
            peak = result.facts["ours packed 2 x 1 GiB, HTTP memory MiB"]["first push"]
            result.claim("extra GPU memory, packed, two buffers, MiB", peak, 2048 + 64)
        mib = result.facts[f"ours, {way} memory MiB"]["later pushes"]
        result.claim(f"extra GPU memory, {way}, MiB", mib, 16)
        left = result.facts[f"ours, {way}: MiB left by 100 pushes"]
        for what, mib in left.items():
            result.claim(f"left by 100 pushes, {way}, {what}, MiB", mib, 4)
    same = result.facts["same tokens as vLLM's own reload"]
    result.claim("same tokens as vLLM's own reload", float(same), 1, at_least=True)


if __name__ == "__main__":
    main()
