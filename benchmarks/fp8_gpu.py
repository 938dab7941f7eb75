"""A push into an engine that quantises to fp8 as it loads, beside vLLM's own processing of it.

    python -m benchmarks.fp8_gpu --out benchmarks/results [--rounds 10]

Engine and trainer in one process, dense and MoE, a few layers each. Every linear layer and every
expert is a module that vLLM computes from its checkpoint tensors: a push copies those and has vLLM
process them, so it can cost what that processing costs and no more. Rows are milliseconds; those of
the processing are what CUDA events around each of vLLM's calls say, in rounds of their own.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.ipc_gpu import floor_ms, timed
from benchmarks.result import Result
from vllm_wt_plugin import WeightSync, as_source

LAYERS = {"8b": 12, "30b-a3b": 6}
PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}


class Processing:
    """Times vLLM's `process_weights_after_loading` of a model's layers while it is `on`."""

    def __init__(self) -> None:
        self.on = False
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def watch(self, model: torch.nn.Module) -> None:
        """On the classes: a push gives each layer's method the state of a fresh load."""
        methods = {type(getattr(m, "quant_method", None)) for m in model.modules()}
        bases = {base for kind in methods for base in kind.__mro__}
        for kind in bases:
            if call := kind.__dict__.get("process_weights_after_loading"):
                kind.process_weights_after_loading = self._timed(call)  # type: ignore[attr-defined]

    def _timed(self, call: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        @functools.wraps(call)
        def timed(method: Any, layer: Any) -> None:
            if not self.on:
                return call(method, layer)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.on = False  # what it calls of its base class is part of it
            start.record()
            call(method, layer)
            end.record()
            self.on = True
            self._pairs.append((start, end))
            return None

        return timed

    def of(self, what: Callable[[], object]) -> float:
        """Milliseconds of it while `what` runs."""
        self._pairs.clear()
        self.on = True
        what()
        torch.cuda.synchronize()
        self.on = False
        return sum(a.elapsed_time(b) for a, b in self._pairs)


def tokens(llm: Any) -> list[int]:
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    how = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    return list(llm.generate([PROMPT], how, use_tqdm=False)[0].outputs[0].token_ids)


def measure(result: Result, shape: str, rounds: int) -> None:
    folder = shapes.folder(shape, Path(f"/tmp/wt-bench-fp8-{shape}"), layers=LAYERS[shape])
    model = shapes.trainer_model(folder, "cuda")
    llm = engines.llm(folder, "ipc", memory=0.25, quantization="fp8")
    processing = Processing()
    llm.apply_model(processing.watch)
    theirs = {"weights_iterator": list(as_source(model))}
    nbytes = sum(p.nbytes for p in model.parameters())

    def reload() -> None:
        llm.collective_rpc("reload_weights", kwargs=theirs)
        torch.cuda.synchronize()

    with WeightSync(llm) as sync:

        def push() -> None:
            sync.push(model)

        first = sync.push(model)
        result.facts[shape] = {
            "layers": LAYERS[shape], "bytes": nbytes, "tensors": first.tensors,
            "processed modules": len(first.replicas[0].plan.processed),
        }  # fmt: skip
        mine = tokens(llm)
        reload()
        same = tokens(llm) == mine
        rows = {
            "floor: device copy": floor_ms(nbytes, rounds),
            "ours: push": timed(push, rounds),
            "ours: of it, vLLM's processing": [processing.of(push) for _ in range(rounds)],
            "vLLM: reload": timed(reload, rounds),
            "vLLM: of it, its processing": [processing.of(reload) for _ in range(rounds)],
        }
        for row, ms in rows.items():
            result.add(f"{row}, {shape}", ms)
        sync.push(model)
        same = same and tokens(llm) == mine
    floor, ours, part, whole, own = (result.median(f"{row}, {shape}") for row in rows)
    result.claim(f"{shape}: processing in a push, times vLLM's own", part / own, 1.05)
    result.claim(f"{shape}: a push beside its processing, ms", ours - part, 1.25 * floor + 5)
    result.claim(f"{shape}: faster than vLLM's reload", whole / ours, 1, at_least=True)
    result.claim(f"{shape}: same tokens as after vLLM's reload", float(same), 1, at_least=True)
    llm.llm_engine.engine_core.shutdown()


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--rounds", type=int, default=10)
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "wt"}
    result = Result("fp8-gpu")
    for shape in LAYERS:
        measure(result, shape, a.rounds)
        gc.collect()
        torch.cuda.empty_cache()
        print("WROTE", result.write(a.out), flush=True)


if __name__ == "__main__":
    main()
