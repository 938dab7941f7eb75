"""`vllm-wt push`: a checkpoint folder into servers, with a row for each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from vllm_wt_plugin.cli import show
from vllm_wt_plugin.trainer.report import PushReport
from vllm_wt_plugin.trainer.source import Source, as_source
from vllm_wt_plugin.trainer.sync import WeightSync
from vllm_wt_plugin.wire.params import ParamSpec

BUFFER = 1 << 30  # larger checkpoints go through two buffers of this


class Watched:
    """A folder's source that moves the servers' bars as it is read: one pass for each server in
    a packed push, one for all in a direct one."""

    gathers = False
    device = torch.device("cpu")

    def __init__(self, source: Source, progress: Progress, tasks: list[list[TaskID]]) -> None:
        self._source, self._progress, self._tasks = source, progress, tasks
        self._passes = 0

    def specs(self) -> tuple[ParamSpec, ...]:
        return self._source.specs()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        tasks = self._tasks[min(self._passes, len(self._tasks) - 1)]
        self._passes += 1
        for task in tasks:
            self._progress.update(task, completed=0, state="sending")
        for name, t in self._source:
            yield name, t
            for task in tasks:
                self._progress.advance(task, t.nbytes)


def push(
    checkpoint: Path, urls: list[str], version: str, base: Path | None, *,
    token: str | None, timeout_s: float, hide: bool,
) -> PushReport:  # fmt: skip
    """Dense, or what differs from `base`, which the servers must hold (it is compared)."""
    source = as_source(checkpoint)
    total = sum(s.nbytes for s in source.specs())
    packed = total > BUFFER
    with WeightSync(urls, token=token, timeout_s=timeout_s, packed=packed) as sync:
        if base is not None:
            sync.adopt(base)
            return sync.push(source, version, mode="sparse")
        with show.bars(hide) as progress:
            rows = [progress.add_task(u, total=total, state="waiting") for u in urls]
            tasks = [[r] for r in rows] if packed else [rows]
            report = sync.push(Watched(source, progress, tasks), version)
            for row in rows:
                progress.update(row, completed=total, state="done")
        return report


def described(report: PushReport) -> dict[str, Any]:
    """The report as plain data; errors are `to_dict()`s."""
    return {
        "version": report.version,
        "ok": report.ok,
        "tensors": report.tensors,
        "bytes": report.bytes,
        "changed": report.changed,
        "seconds": report.seconds,
        "servers": {
            r.name: r.error.to_dict() if r.error else {"version": r.version, "seconds": r.seconds}
            for r in report.replicas
        },
    }


def summary(report: PushReport) -> None:
    """A table with a row for each server."""
    total = report.seconds["total"]
    speed = f"{report.bytes / total / 1e9:.2f} GB/s to each"
    changed = "" if report.changed is None else f"; {report.changed:.3%} of the elements changed"
    show.out.print(
        f"version {report.version}: {report.tensors} tensors, {show.size(report.bytes)} in "
        f"{total:.2f} s ({speed}){changed}", markup=False,
    )  # fmt: skip
    rows = [(r.name, r.version, "problem" if r.error else "ok") for r in report.replicas]
    show.table("", ("server", "version", "result"), rows)
    for r in report.replicas:
        if r.error is not None:
            show.out.print(f"{r.name}: {r.error}", markup=False, style="red")
