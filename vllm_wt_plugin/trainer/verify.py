"""The full check: checksums of what the engines hold against the trainer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from vllm_wt_plugin.sparse.checksum import begin_runs
from vllm_wt_plugin.trainer.report import VerifyReport
from vllm_wt_plugin.wire.patches import added_up
from vllm_wt_plugin.wire.replies import Held


def verify(
    replicas: Mapping[str, Held], source: Iterable[tuple[str, torch.Tensor]]
) -> VerifyReport:
    """Compare what replicas hold with `source`: reads every tensor of it, in each dtype that an
    engine holds it in."""
    differ: dict[str, list[str]] = {r: [] for r in replicas}
    unseen: dict[str, list[str]] = {r: [] for r in replicas}
    begun: list[tuple[str, str, int | str, Callable[[], list[int]]]] = []
    for name, t in source:
        own: dict[str, Callable[[], list[int]]] = {}
        for replica, held in replicas.items():
            found = added_up(held.ranks, name)
            if found is None:
                unseen[replica].append(name)
                continue
            dtype = held.report.stored.get(name, "")
            if dtype not in own:
                cast = t.to(getattr(torch, dtype)) if dtype else t
                own[dtype] = begin_runs([(name, cast, 0)])
            begun.append((replica, name, found, own[dtype]))
    for replica, name, have, sums in begun:  # the GPU has not waited for us in between
        if [have] != sums():
            differ[replica].append(name)
    return VerifyReport(differ, unseen)
