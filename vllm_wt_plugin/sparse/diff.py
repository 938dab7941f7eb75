"""What changed between two copies of the weights: indices and values, compacted on the device.

Bits are compared, not numbers: another NaN is a change, and so is −0.0 for 0.0. The reference is
torch, tensor by tensor; on CUDA `cuda_diff.py` reads both copies once, for all tensors in a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_wt_plugin.sparse.checksum import Sum, checksum_change
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
    sums: tuple[Sum, ...]


def diff(pairs: Sequence[Pair], capacity: int) -> list[Diff] | None:
    """The changes, tensors without any left out; None if more than `capacity` elements changed.

    Blocking. Temporary memory: that of the changes, on CUDA a bit per element, plus one tensor
    where it must be rounded or made contiguous first.
    """
    groups: dict[tuple[torch.device, int, torch.dtype], list[Pair]] = {}
    for p in pairs:
        if p.spec.numel:
            key = p.new.device, p.old.element_size(), index_dtype(p.spec.numel)
            groups.setdefault(key, []).append(p)
    out: list[Diff] = []
    for (device, *_), rows in groups.items():
        if device.type == "cuda":
            from vllm_wt_plugin.sparse.cuda_diff import cuda_diff as one
        else:
            one = torch_diff
        found = one(rows, capacity)
        if found is None:
            return None
        capacity -= found.group.indices.numel()
        if found.group.specs:
            out.append(found)
    return out


def torch_diff(pairs: Sequence[Pair], capacity: int) -> Diff | None:
    """The reference, for pairs of one word and index width."""
    word = WORDS[pairs[0].old.element_size()]
    index = index_dtype(pairs[0].spec.numel)
    specs, counts, indices, values, sums = [], [], [], [], []
    for p in pairs:
        new = p.new.to(p.old.dtype).contiguous().reshape(-1).view(word)
        old = p.old.reshape(-1).view(word)
        at = (new != old.to(new.device)).nonzero().squeeze(1)
        if not at.numel():
            continue
        capacity -= at.numel()
        if capacity < 0:
            return None
        specs.append(p.spec)
        counts.append(at.numel())
        indices.append(at.to(index))
        values.append(new[at])
        sums.append(
            checksum_change(p.spec.name, at, old[at.to(old.device)].to(new.device), new[at])
        )
    device = pairs[0].new.device
    none = torch.empty(0, device=device)
    group = Group(
        tuple(specs),
        tuple(counts),
        torch.cat(indices or [none.to(index)]),
        torch.cat(values or [none.to(word)]),
    )
    return Diff(group, tuple(sums))
