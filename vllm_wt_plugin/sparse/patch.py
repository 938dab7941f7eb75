"""Patches in checkpoint coordinates: what they are, and every check before one is believed.

One patch is `SparseWeightPatch`. A whole update's patches travel and are worked on as `Group`s:
all of one word width end to end, so that an update takes a few launches, not a few per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from vllm_wt_plugin.errors import HandleError, PlanError, RequestError
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import INDICES, VALUES, PatchPush

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
MAX_INT32 = 2**31 - 1


@dataclass(frozen=True, slots=True)
class SparseWeightPatch:
    """New values of some elements of one checkpoint tensor.

    `indices`: 1-d int32 or int64, flat in the contiguous tensor; `values`: 1-d, as many, in the
    dtype the engine holds. Any order, no index twice. `full_shape` None: the engine's.
    """

    name: str
    indices: torch.Tensor
    values: torch.Tensor
    full_shape: tuple[int, ...] | None = None

    def check(self) -> None:
        """Lengths, dimensions and dtypes; RequestError naming the parameter."""
        if self.indices.dim() != 1 or self.values.dim() != 1:
            raise RequestError("indices and values of a patch have one dimension", where=self.name)
        if self.indices.dtype not in (torch.int32, torch.int64):
            raise RequestError(
                f"indices are {self.indices.dtype}", where=self.name,
                next_step="use int32, or int64 beyond 2^31 elements",
            )  # fmt: skip
        if self.indices.numel() != self.values.numel():
            raise RequestError(
                f"{self.indices.numel()} indices for {self.values.numel()} values",
                where=self.name,
            )


@dataclass(frozen=True, slots=True)
class Group:
    """The patches of tensors with one word width and one index width, end to end.

    `counts[i]` elements belong to `specs[i]`; `values` are words (`WORDS`), whatever the dtype.
    """

    specs: tuple[ParamSpec, ...]
    counts: tuple[int, ...]
    indices: torch.Tensor
    values: torch.Tensor

    @property
    def starts(self) -> list[int]:
        return list(accumulate(self.counts, initial=0))

    def rows(self) -> Iterable[tuple[ParamSpec, torch.Tensor, torch.Tensor]]:
        """Each patch: its spec, indices and words."""
        sizes = list(self.counts)
        yield from zip(self.specs, self.indices.split(sizes), self.values.split(sizes), strict=True)

    def split(self, apart: Callable[[ParamSpec], bool]) -> tuple[Group, Group]:
        """The patches for which `apart` is false, and the others."""
        out = []
        for side in (False, True):
            rows = [r for r in self.rows() if apart(r[0]) is side]
            none = self.indices[:0], self.values[:0]
            out.append(
                Group(
                    tuple(s for s, *_ in rows),
                    tuple(i.numel() for _, i, _ in rows),
                    torch.cat([none[0], *(i for _, i, _ in rows)]),
                    torch.cat([none[1], *(v for *_, v in rows)]),
                )
            )
        return out[0], out[1]


def index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel <= MAX_INT32 else torch.int64


def check_known(specs: Iterable[ParamSpec], served: Mapping[str, ParamSpec]) -> None:
    """Names, shapes and dtypes are those the engine holds; raises PlanError or RequestError."""
    specs = tuple(specs)
    if not specs:
        raise RequestError("the update has no patches", next_step="name at least one tensor")
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise RequestError("two patches for one name", where=spec.name)
        seen.add(spec.name)
        have = served.get(spec.name)
        if have is None:
            raise PlanError(
                "the served model has no such tensor", where=spec.name,
                next_step="compare the names with the served model's checkpoint",
            )  # fmt: skip
        if have.shape != spec.shape:
            raise PlanError(
                f"the patch is for shape {spec.shape}, the engine's is {have.shape}",
                where=spec.name,
            )
        if have.dtype != spec.dtype:
            raise PlanError(
                f"the patch has {spec.dtype} values, the engine holds {have.dtype}",
                where=spec.name,
                next_step=f"round the new and old values to {have.dtype}, then compare them",
            )


def ordered(group: Group) -> Group:
    """The group with strictly ascending indices in each patch, all of them in range.

    What is ascending already (our trainer's) is read once and returned as is. Raises RequestError
    naming the parameter for an index out of range or given twice.
    """
    if not group.indices.numel():
        return group
    if not _ascending(group):
        group = _sorted(group)
    _check_range(group)
    return group


def _ascending(group: Group) -> bool:
    rises = group.indices[1:] > group.indices[:-1]
    edges = [s - 1 for s in group.starts[1:-1] if 0 < s < group.indices.numel()]
    if edges:  # from one patch to the next anything goes
        rises[torch.tensor(edges, device=rises.device)] = True
    return bool(rises.all())


def _sorted(group: Group) -> Group:
    indices, values = [], []
    for spec, i, v in group.rows():
        ascending, order = i.sort()
        twice = ascending[1:] == ascending[:-1]
        if bool(twice.any()):
            raise RequestError(
                f"index {int(ascending[1:][twice][0])} is given twice", where=spec.name
            )
        indices.append(ascending)
        values.append(v[order])
    return replace(group, indices=torch.cat(indices), values=torch.cat(values))


def _check_range(group: Group) -> None:
    rows = [
        (spec, start, stop - 1)
        for spec, start, stop in zip(group.specs, group.starts, group.starts[1:], strict=False)
        if stop > start
    ]
    ends = torch.tensor([[a, b] for _, a, b in rows], device=group.indices.device)
    for (spec, *_), (low, high) in zip(rows, group.indices[ends].tolist(), strict=True):
        if low < 0 or high >= spec.numel:
            raise RequestError(
                f"index {low if low < 0 else high} of {spec.numel} elements", where=spec.name
            )


def grouped(patches: Sequence[SparseWeightPatch], specs: Mapping[str, ParamSpec]) -> list[Group]:
    """Patches of any trainer as groups, unsorted as they are; `specs` give shape and dtype."""
    by_width: dict[tuple[int, torch.dtype], list[SparseWeightPatch]] = {}
    for p in patches:
        p.check()
        width = p.values.element_size(), index_dtype(specs[p.name].numel)
        by_width.setdefault(width, []).append(p)
    return [
        Group(
            tuple(specs[p.name] for p in rows),
            tuple(p.indices.numel() for p in rows),
            torch.cat([p.indices for p in rows]).to(index),
            torch.cat([p.values.view(WORDS[size]) for p in rows]),
        )
        for (size, index), rows in by_width.items()
    ]


def received(push: PatchPush, memory: dict[str, torch.Tensor]) -> list[SparseWeightPatch]:
    """The patches of a push that came as tensors, on their own device, unchecked."""
    try:
        return [
            SparseWeightPatch(n, memory[INDICES + n], memory[VALUES + n], tuple(shape))
            for n, shape in zip(push.names, push.shapes, strict=True)
        ]
    except KeyError as exc:
        raise HandleError("the patch has no such tensor", where=str(exc.args[0])) from exc
