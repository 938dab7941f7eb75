"""What changed since the last push: a copy of the weights as the engines hold them, and its cost.

source ─ Snapshot.changes ─▶ Changes ─ (pushed) ─▶ Snapshot.accept
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from vllm_wt_plugin.sparse.diff import Comparison, Diff, Pair
from vllm_wt_plugin.trainer.listing import Listing
from vllm_wt_plugin.wire.messages import PlanReport
from vllm_wt_plugin.wire.params import ParamSpec


@dataclass(frozen=True)
class Changes:
    """Patches, and tensors that must travel in full with all of their group."""

    diffs: tuple[Diff, ...]
    whole: tuple[tuple[ParamSpec, torch.Tensor], ...]
    total: int  # elements of the model
    nbytes: int  # that a dense push would move

    @property
    def changed(self) -> int:
        return sum(d.group.indices.numel() for d in self.diffs)

    @property
    def bytes(self) -> int:
        """What travels."""
        patches = sum(d.group.indices.nbytes + d.group.values.nbytes for d in self.diffs)
        return patches + sum(s.nbytes for s, _ in self.whole)


class Begun(NamedTuple):
    """A comparison under way, of these tensors."""

    source: Listing
    result: Callable[[int], list[Diff] | None]


class Snapshot:
    """The weights of the last push, in the dtypes the engines hold.

    `host`: in pinned host memory instead of on the tensors' own device. One copy of the model
    either way; of a trainer in float32 for engines in bfloat16, half of it.
    """

    def __init__(self, source: Listing, plan: PlanReport, *, host: bool) -> None:
        self._stored, self._host = plan.stored, host
        self._whole = {} if plan.shadowed else plan.whole
        self._held: dict[str, torch.Tensor] = {}
        self._doubtful: frozenset[str] = frozenset()
        self.total = sum(s.numel for s in source.specs)
        self._nbytes = sum(s.nbytes for s in source.specs)
        self._compared: tuple[Listing, Comparison] | None = None
        self.retake(source)

    def retake(self, source: Listing) -> None:
        """After a dense push."""
        for name, t in source:
            dtype = self._dtype(name, t)
            if name not in self._held:
                self._held[name] = self._empty(t, dtype)
            self._held[name].copy_(t.detach())
        self._doubtful = frozenset()

    def doubt(self, names: Iterable[str]) -> None:
        """The engines may hold something else under these: the next changes bring them whole."""
        self._doubtful = frozenset(self._whole.keys() & set(names))

    def _dtype(self, name: str, t: torch.Tensor) -> torch.dtype:
        stored = self._stored.get(name)
        return t.dtype if stored is None else getattr(torch, stored)

    def _empty(self, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self._host and t.is_cuda:
            return torch.empty(t.shape, dtype=dtype, pin_memory=True)
        return torch.empty(t.shape, dtype=dtype, device=t.device)

    def fits(self, source: Listing) -> bool:
        """Are these the tensors the snapshot is of?"""
        if self._compared is not None and self._compared[0] is source:
            return True
        return [(s.name, s.shape) for s in source.specs] == [
            (n, tuple(t.shape)) for n, t in self._held.items()
        ]

    def begin(self, source: Listing) -> Begun | None:
        """Compare before a look at the source says whether these are still its tensors; None if
        that is not prepared."""
        if self._compared is None or self._compared[0] is not source:
            return None
        comparison = self._compared[1]
        return Begun(source, comparison.begin()) if comparison.there else None

    def changes(self, source: Listing, most: float, begun: Begun | None = None) -> Changes | None:
        """Compare bit by bit, on the device; or wait for what was `begun`, of the same tensors.
        None if more than the share `most` has changed."""
        if begun is None or begun.source is not source:
            begun = Begun(source, self._comparison(source).begin())
        found = begun.result(int(most * self.total))
        if found is None:
            return None
        whole: tuple[tuple[ParamSpec, torch.Tensor], ...] = ()
        if self._whole:
            names = {s.name for d in found for s in d.group.specs} | self._doubtful
            groups = {self._whole[n] for n in names if n in self._whole}
            whole = tuple((_spec(n, t), t) for n, t in source if self._whole.get(n) in groups)
            found = [_without(d, self._whole) for d in found]
        return Changes(tuple(d for d in found if d.group.specs), whole, self.total, self._nbytes)

    def _comparison(self, source: Listing) -> Comparison:
        if self._compared is None or self._compared[0] is not source or source.tensors is None:
            self._compared = source, Comparison([self._pair(n, t.detach()) for n, t in source])
        return self._compared[1]

    def _pair(self, name: str, t: torch.Tensor) -> Pair:
        old = self._held[name]
        return Pair(_spec(name, old), t, old)

    def accept(self, changes: Changes) -> None:
        """The engines have taken them: the ones found last."""
        for spec, t in changes.whole:
            self._held[spec.name].copy_(t)
        if self._compared is not None:
            self._compared[1].accept([d.group for d in changes.diffs])
            if self._compared[0].tensors is None:
                self._compared = None  # made for this push alone
        self._doubtful = frozenset()

    def first(self) -> ParamSpec:
        """Any tensor that takes patches: what an update without changes names."""
        name = next((n for n in self._held if n not in self._whole), next(iter(self._held)))
        return _spec(name, self._held[name])

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._held.items())


def _spec(name: str, t: torch.Tensor) -> ParamSpec:
    return ParamSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape))


def _without(d: Diff, whole: Mapping[str, str]) -> Diff:
    kept, _ = d.group.split(lambda s: s.name in whole)
    sums = [x for s, x in zip(d.group.specs, d.sums, strict=True) if s.name not in whole]
    return Diff(kept, tuple(sums))


@dataclass
class Cost:
    """When sparse is cheaper than dense, from what both took in this process: no guess.

    Until both are known, up to `START` of the elements goes sparse, so that both become known.
    """

    START = 0.1

    dense_s: float | None = None
    per_element_s: float | None = None
    fixed_s: float = 0.0
    _small: list[float] = field(default_factory=list)

    def note_dense(self, seconds: float) -> None:
        """The fastest of the recent ones counts: the first push of a model plans it."""
        best = self.dense_s
        self.dense_s = seconds if best is None else min(best * 1.1, seconds)

    def note_sparse(self, seconds: float, changed: int, total: int) -> None:
        """Time of a whole sparse push, comparison included."""
        self._small = sorted([*self._small, seconds])[:3]
        self.fixed_s = self._small[0]
        if changed > total * 1e-3:
            rate = max(seconds - self.fixed_s, 0.0) / changed
            old = self.per_element_s
            self.per_element_s = rate if old is None else 0.5 * (old + rate)

    def most(self, total: int) -> float:
        """The largest share of changed elements that should go sparse."""
        if self.dense_s is None or self.per_element_s is None or self.per_element_s <= 0:
            return self.START
        return min(0.5, max(0.0, (self.dense_s - self.fixed_s) / self.per_element_s / total))
