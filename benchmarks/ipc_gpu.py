"""`ipc` on one GPU: our push against vLLM's own backend and a plain copy, in one run.

    python -m benchmarks.ipc_gpu --shape 8b --out benchmarks/results [--llm] [--rounds 12]

The trainer is this process, with a transformers model on the GPU; the engines are processes of
their own on the same GPU, with dummy weights. Each row is the time of one whole push as the
trainer sees it, weights live at its end. Times in ms; `floor` copies the same bytes buffer to
buffer on the device.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics as st
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.result import Result
from vllm_wt_plugin import WeightSync, as_source


class MemoryPeak:
    """The device's used bytes above a start value, sampled every 2 ms while active."""

    def __enter__(self) -> MemoryPeak:
        torch.cuda.synchronize()
        self.start = self.peak = _used()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, _used())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.above = self.peak - self.start
        self.left = _used() - self.start


def _used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


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
    result: Result, row: str, target: Any, model: Any, rounds: int, step: Any, **options: Any
) -> list[Any]:
    """Time our push; its phases, memory, and a hundred more pushes for leaks."""
    reports: list[Any] = []
    with WeightSync(target, **options) as sync:
        with MemoryPeak() as first:
            reports.append(sync.push(model))
        print(f"{row}: first {reports[0]}", flush=True)
        with MemoryPeak() as warm:
            result.add(row, timed(lambda: reports.append(sync.push(model)), rounds, step))
        names = {k for r in reports[2:] for k in {**r.seconds, **r.replicas[0].seconds}}
        result.phases[row] = {
            n: round(
                st.median({**r.seconds, **r.replicas[0].seconds}.get(n, 0.0) for r in reports[2:])
                * 1e3,
                3,
            )
            for n in sorted(names)
        }
        with MemoryPeak() as many:
            for _ in range(100):
                sync.push(model)
        result.facts[f"{row} memory MiB"] = {
            "first push": first.above >> 20,
            "later pushes": warm.above >> 20,
            "left after 100 more": many.left >> 20,
        }
    print(row, result.phases[row], result.facts[f"{row} memory MiB"], flush=True)
    return reports


def upstream(
    result: Result, row: str, client: Any, model: Any, rounds: int, step: Any, packed: int
) -> None:
    """Time vLLM's own trainer engine; `packed` is the buffer's bytes, 0 for unpacked."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.ipc_engine import (
        IPCTrainerInitInfo,
        IPCTrainerWeightTransferEngine,
    )

    source = as_source(model)

    class Theirs(WeightSource):
        @functools.cached_property
        def metadata(self) -> list[ParamMeta]:  # a property in vLLM 0.33, a method before
            return [ParamMeta(s.name, getattr(torch, s.dtype), s.shape) for s in source.specs()]

        def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(source)

        __iter__ = iter_full  # vLLM 0.32's name for it

    more = {"packed_buffer_size_bytes": packed} if packed else {}
    info = IPCTrainerInitInfo(rank=0, packed=bool(packed), **more)
    engine = IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=Theirs())
    with MemoryPeak() as memory:
        result.add(row, timed(engine.send_weights, rounds, step))
    result.facts[f"{row} memory MiB"] = {"later pushes": memory.above >> 20}
    torch.cuda.ipc_collect()


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
    a.out.mkdir(parents=True, exist_ok=True)
    folder = shapes.folder(a.shape, Path(f"/tmp/wt-bench-{a.shape}"), layers=a.layers)
    result = Result(f"ipc-gpu-{a.shape}")
    memory = {"tiny": 0.05, "8b": 0.17, "30b-a3b": 0.32}[a.shape]
    logs = {b: Path(f"/tmp/{b}-{a.shape}.log") for b in ("ipc", "upstream_ipc")}
    port = {"tiny": 8100, "8b": 8102, "30b-a3b": 8104}[a.shape]
    with ExitStack() as stack:
        urls = {}
        for i, (backend, log) in enumerate(logs.items()):
            urls[backend] = stack.enter_context(
                engines.server(folder, backend, port + i, log, memory=memory)
            )
        model = shapes.trainer_model(folder, "cuda")
        specs = as_source(model).specs()
        nbytes = sum(s.nbytes for s in specs)
        result.facts |= {
            "tensors": len(specs),
            "bytes": nbytes,
            "shape": a.shape,
            "layers": a.layers or shapes.SHAPES[a.shape]["num_hidden_layers"],
        }
        result.add("floor: one device copy", floor_ms(nbytes))
        small = [p for p in model.parameters() if p.dim() == 1]

        def step() -> None:  # new weights each round, cheaply
            torch._foreach_mul_(small, 1.001)

        for backend, log in logs.items():
            engines.wait_ready(urls[backend], log)
        measure_http(result, urls, model, step, a)
        if a.llm:
            measure_llm(result, folder, memory, model, step, a)
    claims(result, a)
    print("WROTE", result.write(a.out), flush=True)


def measure_http(result: Result, urls: dict[str, str], model: Any, step: Any, a: Any) -> None:
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    reports = ours(result, "ours, HTTP", urls["ipc"], model, a.rounds, step)
    plan = reports[0].replicas[0].plan
    result.facts["plan"] = {
        "segments": plan.segments,
        "in place": plan.in_place,
        "processed": len(plan.processed),
        "opaque": len(plan.opaque),
    }
    ours(
        result,
        "ours packed 2 x 1 GiB, HTTP",
        urls["ipc"],
        model,
        a.rounds,
        step,
        packed=True,
        buffer_bytes=1 << 30,
    )
    client = HTTPVLLMWeightSyncClient(urls["upstream_ipc"])
    for row, packed in (("unpacked", 0), ("packed 4 GiB", 4 << 30)):
        upstream(result, f"vLLM ipc {row}, HTTP", client, model, a.slow_rounds, step, packed)
    with WeightSync(urls["ipc"]) as sync:
        sync.push(model)
    both = {b: engines.tokens(u) for b, u in urls.items()}
    print("tokens", both, flush=True)
    result.facts["same tokens as vLLM's own reload"] = both["ipc"] == both["upstream_ipc"]


def measure_llm(result: Result, folder: Path, memory: float, model: Any, step: Any, a: Any) -> None:
    llm = engines.llm(folder, "ipc", memory=memory)
    ours(result, "ours, engine process", llm, model, a.rounds, step)
    llm.llm_engine.engine_core.shutdown()
    llm = engines.llm(folder, "upstream_ipc", memory=memory)
    for row, packed in (("unpacked", 0), ("packed 4 GiB", 4 << 30)):
        name = f"vLLM ipc {row}, engine process"
        upstream(result, name, LLMCalls(llm), model, a.slow_rounds, step, packed)
    llm.llm_engine.engine_core.shutdown()


def claims(result: Result, a: Any) -> None:
    floor = result.median("floor: one device copy")
    dense = "moe" not in a.shape and "a3b" not in a.shape
    for way, faster in (("HTTP", 12 if dense else 50), ("engine process", 8 if dense else 50)):
        if f"ours, {way}" not in result.rows:
            continue
        push = result.median(f"ours, {way}")
        limit = (1.25 if dense else 1.5) * floor + 5
        result.claim(f"push, {way}, ms", push, limit)
        best = min(
            v
            for k, v in ((k, result.median(k)) for k in result.rows)
            if k.startswith("vLLM") and k.endswith(way)
        )
        result.claim(f"faster than vLLM's best ipc, {way}", best / push, faster, at_least=True)
        if way == "HTTP":
            peak = result.facts["ours packed 2 x 1 GiB, HTTP memory MiB"]["first push"]
            result.claim("extra GPU memory, packed, two buffers, MiB", peak, 2048 + 64)
        for when, most in (("later pushes", 16), ("left after 100 more", 16)):
            mib = result.facts[f"ours, {way} memory MiB"][when]
            result.claim(f"extra GPU memory, {way}, {when}, MiB", mib, most)


if __name__ == "__main__":
    main()
