"""One copy of the weights on one GPU: a training step through the bridge against step and push.

    python -m benchmarks.bridge_gpu --shape 8b --out benchmarks/results [--rounds 10]

Two engines with dummy weights start from the same pushed ones. One trains through the bridge: its
own tensors are the trainer's parameters. The other gets a push after each step of a trainer that
has a copy. Gradients are random and the same for both, so that both must end with the same
tokens. Times of one optimiser step with the weights live at its end, in ms.
"""

from __future__ import annotations

import argparse
import os
import statistics as st
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.result import Result
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge
from vllm_wt_plugin.transport.cuda import _allocation


def opened(model: Any) -> int:
    """Bytes of the allocations that the parameters' handles open: more than the weights, where
    vLLM's allocator has put other things beside them."""
    found = {_allocation(p.data_ptr(), 0, "") for p in model.parameters()}
    return sum(size for _, size in found)


def used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


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


def through_the_bridge(result: Result, folder: Path, url: str, rounds: int) -> None:
    config = BridgeConfig(model_name=str(folder), device="cuda:0", vllm_api_url=url)
    start, device = torch.cuda.memory_allocated(), used()
    begin = time.perf_counter()
    with VLLMWeightBridge(config) as bridge:
        model = bridge.get_trainable_model()
        result.facts["attach, s"] = round(time.perf_counter() - begin, 2)
        where = [p.data_ptr() for p in model.parameters()]
        nbytes = sum(p.nbytes for p in model.parameters())
        result.facts["parameters, bytes"] = nbytes
        result.facts["opened by their handles, bytes"] = opened(model)
        result.facts["trainer's memory for them, MiB"] = round(
            (torch.cuda.memory_allocated() - start) / 2**20, 2
        )
        result.facts["device memory for them, MiB"] = (used() - device) >> 20
        trainer = Trainer(model)

        def step() -> None:
            with bridge.update():
                trainer.optimizer.step()

        result.add("ours, bridge: step, weights live", trainer.timed(rounds, step))
        phases: dict[str, list[float]] = {"enter": [], "step": [], "leave": []}
        for _ in range(rounds):
            trainer.gradients()
            marks = [time.perf_counter()]
            with bridge.update():
                marks.append(time.perf_counter())
                trainer.optimizer.step()
                torch.cuda.synchronize()
                marks.append(time.perf_counter())
            marks.append(time.perf_counter())
            for name, a, b in zip(phases, marks, marks[1:], strict=False):
                phases[name].append((b - a) * 1e3)
        result.phases["ours, bridge: step, weights live"] = {
            name: round(st.median(v), 3) for name, v in phases.items()
        }
        result.facts["base addresses moved"] = [p.data_ptr() for p in model.parameters()] != where
        trainer.close()
        del model


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--shape", choices=shapes.SHAPES, default="8b")
    ap.add_argument("--rounds", type=int, default=10)
    ap.add_argument("--own-segments", action="store_true", help="serve with WT_OWN_SEGMENTS=1")
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    folder = shapes.folder(a.shape, Path(f"/tmp/wt-bench-bridge-{a.shape}"))
    if a.own_segments:
        os.environ["WT_OWN_SEGMENTS"] = "1"
    result = Result(f"bridge-gpu-{a.shape}{'-own' if a.own_segments else ''}")
    memory = {"tiny": 0.05, "8b": 0.17, "30b-a3b": 0.32}[a.shape]
    graphs = ("--no-enforce-eager",)
    with ExitStack() as stack:
        urls = {}
        for port, name in ((8130, "bridge"), (8131, "push")):
            log = Path(f"/tmp/bridge-gpu-{name}.log")
            urls[name] = stack.enter_context(
                engines.server(folder, "ipc", port, log, memory=memory, args=graphs)
            )
            engines.wait_ready(urls[name], log)  # one after another: each measures free memory
        copy = shapes.trainer_model(folder, "cuda")
        for url in urls.values():
            with WeightSync(url) as sync:
                sync.push(copy)
        through_the_bridge(result, folder, urls["bridge"], a.rounds)
        trainer = Trainer(copy)
        with WeightSync(urls["push"]) as sync:

            def step() -> None:
                trainer.optimizer.step()
                sync.push(copy)

            result.add("ours, copy: step and push", trainer.timed(rounds=a.rounds, step=step))
            for _ in range(a.rounds):  # as many steps as the bridge's phases took
                trainer.gradients()
                trainer.optimizer.step()
            sync.push(copy)
        both = {name: engines.tokens(url) for name, url in urls.items()}
        print("tokens", both, flush=True)
        result.facts["same tokens after the same steps"] = both["bridge"] == both["push"]
        rounds = trainer.timed(a.rounds, trainer.optimizer.step)
        result.add("floor: the optimiser's step alone", rounds)
    claims(result)
    print("WROTE", result.write(a.out), flush=True)


def claims(result: Result) -> None:
    step = result.median("floor: the optimiser's step alone")
    bridge = result.median("ours, bridge: step, weights live")
    push = result.median("ours, copy: step and push")
    result.claim("bridge: beside the step, ms", bridge - step, 10)
    result.claim("push: its time over the bridge's, beside the step",
                 (push - step) / max(bridge - step, 1e-3), 1, at_least=True)  # fmt: skip
    result.claim("trainer's memory for parameters, MiB",
                 result.facts["trainer's memory for them, MiB"], 16)  # fmt: skip
    same = result.facts["same tokens after the same steps"]
    result.claim("same tokens as after pushes", float(same), 1, at_least=True)
    moved = result.facts["base addresses moved"]
    result.claim("base addresses moved", float(moved), 0)


if __name__ == "__main__":
    main()
