"""Sparse pushes on one GPU: comparing, applying and the whole push, beside vLLM's own loader.

    python -m benchmarks.sparse_gpu --shape 8b --out benchmarks/results [--rounds 10] [--profile]

The trainer is this process with a transformers model on the GPU. `push` goes over HTTP to a server
on the same GPU; `apply` runs in a second engine inside this process, where vLLM's own
`load_checkpoint_weight_patches` applies the very same patches to the very same model. Each share
flips the lowest bit of that many randomly chosen elements. Times in ms.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import engines, shapes
from benchmarks.ipc_gpu import MemoryPeak, floor_ms, timed
from benchmarks.result import Result
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.trainer.delta import Changes, Snapshot
from vllm_wt_plugin.trainer.listing import Lister
from vllm_wt_plugin.trainer.patching import PatchSender
from vllm_wt_plugin.transport.memory import MemoryExporter
from vllm_wt_plugin.wire.messages import PlanReport
from vllm_wt_plugin.wire.patches import PatchPush

SHARES = (0.001, 0.01, 0.1)


class Flips:
    """The elements that a share changes; `flip` changes them, and a second `flip` changes them
    back."""

    def __init__(self, model: Any, share: float) -> None:
        g = torch.Generator(device="cuda").manual_seed(int(share * 1e6))
        self._at = []
        for p in model.parameters():
            flat = p.view(torch.int16).view(-1)
            n = max(1, int(flat.numel() * share))
            at = torch.randint(0, flat.numel(), (n,), generator=g, device="cuda").unique()
            self._at.append((flat, at))

    def flip(self) -> None:
        for flat, at in self._at:
            flat[at] ^= 1


def patches(changes: Changes) -> list[Any]:
    """The same patches as vLLM's loader takes them."""
    from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

    return [
        CheckpointWeightPatch(
            name=spec.name, shape=spec.shape, dtype=getattr(torch, spec.dtype),
            values=words.view(getattr(torch, spec.dtype)), indices=indices,
        )
        for d in changes.diffs
        for spec, indices, words in d.group.rows()
    ]  # fmt: skip


class Applied:
    """Our engine in this process: one push of patches, as often as wanted."""

    def __init__(self, llm: Any) -> None:
        self.session = llm.collective_rpc(lambda w: w.weight_transfer_engine.session)[0]
        self.model = llm.apply_model(lambda m: m)[0]
        self.phases: dict[str, float] = {}  # of the last one

    def apply(self, push: PatchPush, buffer: torch.Tensor) -> Any:
        from vllm_wt_plugin.worker.patches import PatchUpdate

        start = time.perf_counter()
        patched, _ = self.session.known.patched(push)
        update = PatchUpdate(self.session.known.host, patched, push, {"patches": buffer})
        made = time.perf_counter()
        update.prepare()
        checked = time.perf_counter()
        update.apply()
        update.finish()
        torch.cuda.synchronize()
        end = time.perf_counter()
        self.phases = {"tables": made - start, "check": checked - made, "swap": end - checked}
        return update

    def sums(self) -> dict[str, Any]:
        return dict(self.session.known.places_for().sums_of([]))


def loaded(changes: Changes) -> tuple[PatchPush, torch.Tensor]:
    """The changes as they travel."""
    sender = PatchSender(MemoryExporter())
    first = changes.diffs[0].group.specs[0]
    sender.load(changes, first, "1", "2", "benchmark")
    assert sender.push is not None
    assert sender.buffer is not None
    return sender.push, sender.buffer


def measure(result: Result, share: float, sync: WeightSync, ours: Applied, model: Any, a: Any
            ) -> None:  # fmt: skip
    lister, label = Lister(), f"{share:.1%}"
    flips = Flips(model, share)
    snapshot = Snapshot(lister.list(model), PlanReport(), host=False)
    flips.flip()
    found: list[Any] = []
    compare = partial(_diff, found, snapshot, lister, model)
    result.add(f"diff {label}", timed(compare, a.rounds))
    result.add(f"diff {label}, its listing", timed(lambda: lister.list(model), a.rounds))
    found.clear()
    torch.cuda.empty_cache()
    with MemoryPeak() as memory:  # apart: its sampling takes the driver's lock
        compare()
    result.facts[f"diff {label} memory MiB"] = memory.above >> 20
    changes: Changes = found[-1]
    result.facts[f"changed {label}"] = changes.changed
    result.add(f"accept {label}", timed(partial(snapshot.accept, changes), a.rounds))
    if a.profile:
        profiled(f"accept {label}", partial(snapshot.accept, changes))
        flips.flip()
        profiled(f"diff {label}", compare)
        flips.flip()
    found.clear()
    del snapshot, compare
    push, buffer = loaded(changes)
    updates: list[Any] = []

    def back() -> None:
        while updates:
            updates.pop().undo()

    result.add(
        f"apply {label}", timed(lambda: updates.append(ours.apply(push, buffer)), a.rounds, back)
    )
    result.phases[f"apply {label}"] = {k: round(v * 1e3, 3) for k, v in ours.phases.items()}
    print(f"apply {label} phases ms", result.phases[f"apply {label}"], flush=True)
    back()
    if a.profile:
        profiled(f"apply {label}", lambda: updates.append(ours.apply(push, buffer)))
        back()
    torch.cuda.empty_cache()
    with MemoryPeak() as memory:
        updates.append(ours.apply(push, buffer))
    result.facts[f"apply {label} memory MiB"] = memory.above >> 20
    after = ours.sums()
    back()
    torch.cuda.empty_cache()
    theirs(result, label, ours.model, changes, a.slow_rounds)
    result.facts[f"same bits as vLLM's loader {label}"] = ours.sums() == after != {}
    sync.push(model, mode="sparse")
    reports: list[Any] = []
    result.add(
        f"push {label}, HTTP",
        timed(lambda: reports.append(sync.push(model, mode="sparse")), a.rounds, flips.flip),
    )
    result.phases[f"push {label}, HTTP"] = {
        k: round(v * 1e3, 3)
        for k, v in {**reports[-1].seconds, **reports[-1].replicas[0].seconds}.items()
    }
    print(reports[-1], flush=True)
    if a.profile:
        flips.flip()
        profiled(f"push {label}", lambda: sync.push(model, mode="sparse"))


def profiled(label: str, call: Callable[[], object]) -> None:
    """Where one call's time goes, on the host and on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        call()
        torch.cuda.synchronize()
    rows = prof.key_averages()
    print(f"---- {label}, by GPU time\n{rows.table(sort_by='cuda_time_total', row_limit=14)}")
    print(f"---- {label}, by CPU time\n{rows.table(sort_by='self_cpu_time_total', row_limit=14)}",
          flush=True)  # fmt: skip


def _diff(found: list[Any], snapshot: Snapshot, lister: Lister, model: Any) -> None:
    found.clear()  # the last one's memory is free for this one
    last = lister.recall(model)
    begun = None if last is None else snapshot.begin(last)  # as a push does
    found.append(snapshot.changes(lister.list(model), 0.5, begun))


def theirs(result: Result, label: str, model: Any, changes: Changes, rounds: int) -> None:
    from vllm.model_executor.model_loader.checkpoint_weight_patch import (
        load_checkpoint_weight_patches,
    )

    rows = patches(changes)

    def load() -> None:
        load_checkpoint_weight_patches(model, rows)
        torch.cuda.synchronize()

    result.add(f"vLLM's patch loader {label}", timed(load, rounds))
    with MemoryPeak() as memory:
        load()
    result.facts[f"vLLM's patch loader {label} memory MiB"] = memory.above >> 20


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--shape", choices=shapes.SHAPES, default="tiny")
    ap.add_argument("--layers", type=int)
    ap.add_argument("--rounds", type=int, default=10)
    ap.add_argument("--slow-rounds", type=int, default=3, help="of vLLM's own loader")
    ap.add_argument("--profile", action="store_true", help="print the profiler's tables")
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "wt",
                   "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # fmt: skip
    a.out.mkdir(parents=True, exist_ok=True)
    folder = shapes.folder(a.shape, Path(f"/tmp/wt-bench-{a.shape}"), layers=a.layers)
    result = Result(f"sparse-gpu-{a.shape}")
    memory = {"tiny": 0.05, "8b": 0.17, "30b-a3b": 0.32}[a.shape]
    log = Path(f"/tmp/sparse-{a.shape}.log")
    with ExitStack() as stack:
        url = stack.enter_context(engines.server(folder, "ipc", 8110, log, memory=memory))
        model = shapes.trainer_model(folder, "cuda")
        specs = Lister().list(model).specs
        nbytes = sum(s.nbytes for s in specs)
        result.facts |= {"tensors": len(specs), "bytes": nbytes, "shape": a.shape}
        result.add("floor: one device copy", floor_ms(nbytes))
        engines.wait_ready(url, log)
        llm = engines.llm(folder, "ipc", memory=memory)
        with WeightSync(llm) as inside:
            print(inside.push(model), flush=True)
            ours = Applied(llm)
            result.add("checksum of everything", timed(ours.sums, a.rounds))
            with WeightSync(url) as sync:
                sync.push(model, mode="auto")
                result.add("push dense, HTTP", timed(lambda: sync.push(model), a.rounds))
                sync.push(model, mode="auto")
                for share in SHARES:
                    measure(result, share, sync, ours, model, a)
                    inside.push(model)
                    sync.push(model, mode="auto")
                result.facts["verified at the end"] = sync.verify().ok
    claims(result, nbytes)
    print("WROTE", result.write(a.out), flush=True)


def claims(result: Result, nbytes: int) -> None:
    floor = result.median("floor: one device copy")
    bandwidth = 2 * nbytes / floor  # bytes per ms, read and written
    result.claim("checksum of everything, ms", result.median("checksum of everything"), floor)
    for share in SHARES:
        label = f"{share:.1%}"
        result.claim(f"diff {label}, ms", result.median(f"diff {label}"), 1.3 * floor)
        n = result.facts[f"changed {label}"]
        least = n * (6 + 64) / bandwidth
        result.claim(f"apply {label}, ms", result.median(f"apply {label}"), 2 * least + 1)
    faster = result.median("vLLM's patch loader 1.0%") / result.median("apply 1.0%")
    result.claim("apply faster than vLLM's patch loader, 1.0%", faster, 50, at_least=True)
    same = all(v for k, v in result.facts.items() if k.startswith("same bits"))
    result.claim("same bits as vLLM's loader, and verified", float(
        same and result.facts["verified at the end"]), 1, at_least=True)  # fmt: skip


if __name__ == "__main__":
    main()
