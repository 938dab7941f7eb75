"""What changed between two copies of the weights: indices and values, compacted on the device.

Bits are compared, not numbers: another NaN is a change, and so is −0.0 for 0.0. The reference is
torch, tensor by tensor; on CUDA `cuda_diff.py` reads both copies once, for all tensors in a launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_wt_plugin.sparse.checksum import checksum_change
from vllm_wt_plugin.sparse.patch import WORDS, Group, index_dtype
from vllm_wt_plugin.wire.params import ParamSpec


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor now and as it was pushed last; `old` is contiguous and has the served dtype."""

    spec: ParamSpec  # with the served dtype
    new: torch.Tensor  # may have another float dtype: it is rounded first, as a dense push would
    old: torch.Tensor


@dataclass(frozen=True, slots=True)
class Diff:
    """A group of what changed, and by how much each tensor's checksum moves."""

    group: Group
    sums: tuple[int, ...]


class Part(Protocol):
    """Pairs of one device, word and index width."""

    def begin(self) -> Callable[[int], Diff | None]:
        """On CUDA, behind what the current stream was given. What is returned is called once, and
        waits: the changes, tensors without any left out; None if there are more than its argument,
        or than there is memory for."""

    def accept(self, group: Group) -> None:
        """Write the changed values of a find, or some of its tensors, into the old copies."""


class Comparison:
    """Pairs that are compared again and again: what stays the same is prepared once.

    Temporary memory: that of the changes, on CUDA twice that, plus the tensors that must be
    cast or made contiguous first.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._news = [p.new for p in pairs]
        self._at = [t.data_ptr() for t in self._news]
        groups: dict[tuple[torch.device, int, torch.dtype], list[Pair]] = {}
        for p in pairs:
            if p.spec.numel:
                key = p.new.device, p.old.element_size(), index_dtype(p.spec.numel)
                groups.setdefault(key, []).append(p)
        self._parts = [_part(rows) for rows in groups.values()]
        self._part_of = {
            p.spec.name: part
            for rows, part in zip(groups.values(), self._parts, strict=True)
            for p in rows
        }

    @property
    def there(self) -> bool:
        """Whether the memory of all new tensors is still where it was."""
        return self._at == [t.data_ptr() for t in self._news]

    def begin(self) -> Callable[[int], list[Diff] | None]:
        """Begin to compare. What is returned is called once, and waits: what differs; None if more
        elements do than its argument, or too many for the memory."""
        begun = [part.begin() for part in self._parts]

        def result(capacity: int) -> list[Diff] | None:
            out: list[Diff] = []
            for find in begun:
                found = find(capacity)
                if found is None:
                    return None
                capacity -= found.group.indices.numel()
                if found.group.specs:
                    out.append(found)
            return out

        return result

    def accept(self, groups: Sequence[Group]) -> None:
        """The old copies take the changed values. Asynchronous on CUDA."""
        for group in groups:
            self._part_of[group.specs[0].name].accept(group)


def _part(pairs: list[Pair]) -> Part:
    if pairs[0].new.device.type == "cuda":
        from vllm_wt_plugin.sparse.cuda_diff import CudaPart

        return CudaPart(pairs)
    return TorchPart(pairs)


class TorchPart:
    """The reference."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._old = {p.spec.name: _words(p.old) for p in pairs}

    def begin(self) -> Callable[[int], Diff | None]:
        return self._find

    def _find(self, capacity: int) -> Diff | None:
        word = WORDS[self._pairs[0].old.element_size()]
        index = index_dtype(self._pairs[0].spec.numel)
        specs, counts, indices, values, sums = [], [], [], [], []
        for p in self._pairs:
            new, old = _words(p.new.to(p.old.dtype).contiguous()), self._old[p.spec.name]
            at = _differing(new, old.to(new.device), capacity)
            if at is None:
                return None
            if not at.numel():
                continue
            capacity -= at.numel()
            specs.append(p.spec)
            counts.append(at.numel())
            indices.append(at.to(index))
            values.append(new[at])
            before = old[at.to(old.device)].to(new.device)
            sums.append(checksum_change(p.spec.name, at, before, new[at]))
        none = torch.empty(0, device=self._pairs[0].new.device)
        group = Group(
            tuple(specs),
            tuple(counts),
            torch.cat(indices or [none.to(index)]),
            torch.cat(values or [none.to(word)]),
        )
        return Diff(group, tuple(sums))

    def accept(self, group: Group) -> None:
        for spec, indices, values in group.rows():
            old = self._old[spec.name]
            old[indices.long().to(old.device)] = values.to(old.device)


def _differing(new: torch.Tensor, old: torch.Tensor, most: int) -> torch.Tensor | None:
    """Where two 1-d tensors of words differ, int64, ascending; None if in more than `most` places.
    Eight bytes at a time first: hardly any do."""
    per = 8 // new.element_size()
    n = new.numel() // per * per
    if n and per > 1 and not (new.storage_offset() % per or old.storage_offset() % per):
        wide = (new[:n].view(torch.int64) != old[:n].view(torch.int64)).nonzero().squeeze(1)
        if wide.numel() > most:
            return None
        near = (wide[:, None] * per + torch.arange(per, device=new.device)).view(-1)
        rest = torch.arange(n, new.numel(), device=new.device)
        near = torch.cat([near, rest])
        at = near[new[near] != old[near]]
    else:
        at = (new != old).nonzero().squeeze(1)
    return None if at.numel() > most else at


def _words(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(WORDS[t.element_size()])
