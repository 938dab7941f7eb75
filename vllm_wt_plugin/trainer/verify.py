"""The full check: checksums of what the engines hold against the trainer's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from vllm_wt_plugin.sparse.checksum import checksum_run
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
    for name, t in source:
        own: dict[str, int] = {}
        for replica, held in replicas.items():
            found = added_up(held.ranks, name)
            if found is None:
                unseen[replica].append(name)
                continue
            dtype = held.report.stored.get(name, "")
            if dtype not in own:
                own[dtype] = checksum_run(name, t.to(getattr(torch, dtype)) if dtype else t)
            if found != own[dtype]:
                differ[replica].append(name)
    return VerifyReport(differ, unseen)
