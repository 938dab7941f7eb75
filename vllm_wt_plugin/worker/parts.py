"""An update that comes in parts, as vLLM's trainers may send it: a few tensors with each call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_wt_plugin.errors import NoUpdate
from vllm_wt_plugin.wire.buckets import Bucket, buckets_of, size
from vllm_wt_plugin.wire.messages import Announce
from vllm_wt_plugin.worker.packed import rows_in
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.update import Update, check_equal, check_filled, places

if TYPE_CHECKING:
    from vllm_wt_plugin.worker.known import Known
    from vllm_wt_plugin.worker.open import Open

Tensors = dict[str, torch.Tensor]


def check_part(open_: Open, plan: LoadPlan, tensors: Tensors) -> None:
    """Raise PlanError where names that are one tensor bring different values; writes nothing."""
    check_equal(plan, tensors)
    check_filled(plan, tensors, open_.filled)


def apply_part(known: Known, open_: Open, plan: LoadPlan, tensors: Tensors) -> None:
    """Copy what is a plain copy; hold the rest until every name is there."""
    later = tensors.keys() & (plan.computed_names | known.together(plan))
    open_.wrote |= not plan.by_name.keys().isdisjoint(tensors.keys() - later)
    Update(known.host, plan).receive(
        {n: t for n, t in tensors.items() if n not in later}, lasting=False
    )
    open_.held |= {n: tensors[n].clone() for n in later}
    open_.written |= tensors.keys() - later
    open_.filled |= places(plan, tensors)
    open_.parts |= plan.specs


class Part:
    """One that is broadcast: whole tensors, in buckets that have memory of their own each."""

    writes = ahead = False

    def __init__(self, plan: LoadPlan, buckets: list[Bucket], device: torch.device) -> None:
        self._plan, self._buckets = plan, buckets
        self.sizes = [size(b) for b in buckets]
        self.memory = [torch.empty(n, dtype=torch.uint8, device=device) for n in self.sizes]
        self._left = len(buckets)
        self._taken = False

    @classmethod
    def of(cls, plan: LoadPlan, announce: Announce, device: torch.device) -> Part:
        a = announce.announce
        if a is None:
            raise NoUpdate("this part names no tensors", next_step="name them")
        return cls(plan, buckets_of(a.specs, a.geometry, a.buffer_bytes), device)

    def receive(self) -> None:
        """One more bucket is here."""
        self._left -= 1

    @property
    def complete(self) -> bool:
        return not self._left

    def take(self, known: Known, open_: Open) -> None:
        """Write it, once. Raises PlanError as `check_part`."""
        if self._taken:
            return  # another rank was slower
        rows = zip(self._buckets, self.memory, strict=True)
        tensors = {p.spec.name: rows_in(memory, p) for bucket, memory in rows for p in bucket}
        check_part(open_, self._plan, tensors)
        self._taken = True
        apply_part(known, open_, self._plan, tensors)
        self.memory.clear()
