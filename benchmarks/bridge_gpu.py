"""One copy of the weights on one GPU: a training step through the bridge against step and push.

    python -m benchmarks.bridge_gpu --shape 8b --out benchmarks/results [--rounds 10]

One engine with dummy weights. First a trainer with a copy trains and pushes after each step; then,
from the same weights on, one whose parameters are the engine's own tensors. Gradients are random
and the same for both, so that both must end with the same tokens. Times of one optimiser step with
the weights live at its end, in ms. As many layers as five copies (engine, trainer, gradients,
AdamW's two states) fit.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.gpu_memory import opened, used
from benchmarks.result import Result
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge

SPARE = 6 << 30  # bytes beside the five copies
BRIDGE, PUSH = "ours, bridge: step, weights live", "ours, copy: step and push"
STEP = "floor: the optimiser's step alone"


class Trainer:
    """AdamW on given parameters, with random gradients that depend on the step alone."""

    def __init__(self, model: Any) -> None:
        self.parameters = list(model.requires_grad_(True).parameters())
        for p in self.parameters:
            p.grad = torch.empty_like(p)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        self.steps = 0

    def gradients(self) -> None:
        self.steps += 1
        torch.manual_seed(self.steps)
        for p in self.parameters:
            if p.grad is not None:
                p.grad.normal_(0, 1e-3)
        torch.cuda.synchronize()

    def timed(self, rounds: int, step: Callable[[], object]) -> list[float]:
        """Milliseconds of each step but the first two (optimiser state, first push)."""
        out = []
        for _ in range(rounds + 2):
            self.gradients()
            start = time.perf_counter()
            step()
            torch.cuda.synchronize()
            out.append((time.perf_counter() - start) * 1e3)
        return out[2:]

    def close(self) -> None:
        for p in self.parameters:
            p.grad = None
        self.optimizer.state.clear()
        self.parameters.clear()
        torch.cuda.empty_cache()


def with_a_copy(result: Result, folder: Path, url: str, rounds: int) -> list[int]:
    """Step and push; the engine's tokens at the end. Leaves the engine with the first weights."""
    model = shapes.trainer_model(folder, "cuda")
    trainer = Trainer(model)
    phases: list[dict[str, float]] = []

    with WeightSync(url) as sync:
        sync.push(model)

        def step() -> None:
            start = time.perf_counter()
            trainer.optimizer.step()
            torch.cuda.synchronize()
            now = time.perf_counter()
            sync.push(model)
            phases.append({"step": (now - start) * 1e3,
                           "push": (time.perf_counter() - now) * 1e3})  # fmt: skip

        result.add(PUSH, trainer.timed(rounds, step))
        result.add_phases(PUSH, phases[2:])
        tokens = engines.tokens(url)
        result.add(STEP, trainer.timed(rounds, trainer.optimizer.step))
        trainer.close()
        shapes.fill(model)
        sync.push(model)
    return tokens


def through_the_bridge(result: Result, folder: Path, url: str, rounds: int) -> list[int]:
    torch.cuda.empty_cache()
    config = BridgeConfig(model_name=str(folder), device="cuda:0", vllm_api_url=url)
    start, device = torch.cuda.memory_allocated(), used()
    begin = time.perf_counter()
    with VLLMWeightBridge(config) as bridge:
        model = bridge.get_trainable_model()
        result.facts["attach, s"] = round(time.perf_counter() - begin, 2)
        where = [p.data_ptr() for p in model.parameters()]
        result.facts["parameters, bytes"] = sum(p.nbytes for p in model.parameters())
        result.facts["opened by their handles, bytes"] = opened(model)
        mib = round((torch.cuda.memory_allocated() - start) / 2**20, 2)
        result.facts["trainer's memory for them, MiB"] = mib
        result.facts["device memory for them, MiB"] = (used() - device) >> 20
        trainer = Trainer(model)
        phases: list[dict[str, float]] = []

        def step() -> None:
            marks = [time.perf_counter()]
            with bridge.update():
                marks.append(time.perf_counter())
                trainer.optimizer.step()
                torch.cuda.synchronize()
                marks.append(time.perf_counter())
            marks.append(time.perf_counter())
            ms = [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]
            phases.append(dict(zip(("enter", "step", "leave"), ms, strict=True)))

        result.add(BRIDGE, trainer.timed(rounds, step))
        result.add_phases(BRIDGE, phases[2:])
        result.facts["base addresses moved"] = [p.data_ptr() for p in model.parameters()] != where
        tokens = engines.tokens(url)
        trainer.close()
    return tokens


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--shape", choices=shapes.SHAPES, default="8b")
    ap.add_argument("--rounds", type=int, default=10)
    ap.add_argument("--own-segments", action="store_true", help="serve with WT_OWN_SEGMENTS=1")
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    most = shapes.SHAPES[a.shape]["num_hidden_layers"]
    free = torch.cuda.mem_get_info()[0] - SPARE
    layers = shapes.fitting(a.shape, free, 5, least=4, most=most)
    folder = shapes.folder(a.shape, Path(f"/tmp/wt-bench-bridge-{a.shape}"), layers=layers)
    if a.own_segments:
        os.environ["WT_OWN_SEGMENTS"] = "1"
    result = Result(f"bridge-gpu-{a.shape}{'-own' if a.own_segments else ''}")
    result.facts |= {"shape": a.shape, "layers": layers}
    memory = {"tiny": 0.05, "8b": 0.17, "30b-a3b": 0.32}[a.shape]
    log = Path("/tmp/bridge-gpu.log")
    with engines.server(folder, "ipc", 8130, log, memory=memory) as url:
        engines.wait_ready(url, log)
        tokens = {
            "copy": with_a_copy(result, folder, url, a.rounds),
            "bridge": through_the_bridge(result, folder, url, a.rounds),
        }
    print("tokens", tokens, flush=True)
    claims(result, same=tokens["copy"] == tokens["bridge"])
    print("WROTE", result.write(a.out), flush=True)


def claims(result: Result, *, same: bool) -> None:
    step, bridge, push = map(result.median, (STEP, BRIDGE, PUSH))
    result.claim("bridge: beside the step, ms", bridge - step, 10)
    result.claim("push: its time over the bridge's, beside the step",
                 (push - step) / max(bridge - step, 1e-3), 1, at_least=True)  # fmt: skip
    mib = result.facts["trainer's memory for them, MiB"]
    result.claim("trainer's memory for parameters, MiB", mib, 16)
    result.claim("same tokens as after pushes", float(same), 1, at_least=True)
    moved = result.facts["base addresses moved"]
    result.claim("base addresses moved", float(moved), 0)


if __name__ == "__main__":
    main()
