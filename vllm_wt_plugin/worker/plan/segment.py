"""The load plan as data: which part of which checkpoint tensor goes where. Integers only.

checkpoint tensor ── Segment ──▶ (module, tensor) in checkpoint form ──▶ live memory
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

Target = tuple[str, str]  # module's qualified name, tensor's name in it


@dataclass(frozen=True, slots=True)
class Region:
    """A strided part of a tensor's storage; offset and strides count elements."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, t: torch.Tensor) -> Region:
        return cls(int(t.storage_offset()), tuple(t.shape), t.stride())

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def last(self) -> int:
        """Offset of the last element; for an empty region, before its first."""
        if not self.numel:
            return self.offset - 1
        return self.offset + sum((n - 1) * s for n, s in zip(self.size, self.stride, strict=True))

    def of_tensor(self, t: torch.Tensor) -> torch.Tensor:
        """This part of `t`, counted from `t`'s first element."""
        return t.as_strided(self.size, self.stride, t.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Segment:
    """`source` elements (in the contiguous checkpoint tensor `name`) copied to `dest`."""

    name: str
    source: Region
    target: Target
    dest: Region


@dataclass(frozen=True, slots=True)
class Fill:
    """A constant the loader writes, such as vocabulary padding."""

    target: Target
    dest: Region
    value: float


def narrow(seg: Segment, shape: tuple[int, ...], row: int, rows: int) -> Iterator[Segment]:
    """The parts of `seg` whose source lies in rows [row, row + rows) of its tensor of `shape`.

    Their source regions count from the first element of that row. Usually one part; a region
    whose rows run over two of its dimensions gives one per step of the outer.
    """
    step = math.prod(shape[1:]) if shape else 1
    src, begin, end = seg.source, row * step, (row + rows) * step
    if not src.numel or src.offset >= end or src.last < begin:
        return
    if begin <= src.offset and src.last < end:
        moved = Region(src.offset - begin, src.size, src.stride)
        yield Segment(seg.name, moved, seg.target, seg.dest)
        return
    outer = max(range(len(src.size)), key=lambda d: src.stride[d] if src.size[d] > 1 else -1)
    n, span = src.size[outer], src.stride[outer]
    inner = src.last - src.offset - (n - 1) * span
    if inner == 0 or (span % step == 0 and src.offset % step + inner < step):
        # Each step of the outer dimension lies in one row.
        low = max(0, -((src.offset - begin) // span))
        high = min(n, -((src.offset - end) // span))
        if low < high:
            part = _slice(seg, outer, low, high)
            yield from narrow(part, shape, row, rows)
        return
    for i in range(n):
        yield from narrow(_slice(seg, outer, i, i + 1), shape, row, rows)


def _slice(seg: Segment, dim: int, low: int, high: int) -> Segment:
    def cut(r: Region) -> Region:
        size = tuple(high - low if d == dim else n for d, n in enumerate(r.size))
        return Region(r.offset + low * r.stride[dim], size, r.stride)

    return Segment(seg.name, cut(seg.source), seg.target, cut(seg.dest))


def overlaps(segments: Iterable[Segment]) -> Iterator[tuple[Segment, Segment]]:
    """Pairs of segments of ONE destination tensor that share an element.

    Extents are swept in order of offset; only where two extents cross (column shards) is the
    exact set of elements compared.
    """
    open_: list[Segment] = []
    for seg in sorted(segments, key=lambda s: (s.dest.offset, s.dest.last)):
        open_ = [o for o in open_ if o.dest.last >= seg.dest.offset]
        for other in open_:
            if _share(other.dest, seg.dest):
                yield other, seg
        if seg.dest.numel:
            open_.append(seg)


def covered(regions: Iterable[Region]) -> int:
    """Elements of ONE tensor that lie in any of `regions`."""
    total, crossing, last = 0, list[Region](), -1
    for r in sorted({r for r in regions if r.numel}, key=lambda r: (r.offset, r.last)):
        if r.offset > last:
            total, crossing = total + _union(crossing), []
        crossing.append(r)
        last = max(last, r.last)
    return total + _union(crossing)


def _union(regions: list[Region]) -> int:
    if len(regions) < 2:
        return sum(r.numel for r in regions)
    base = regions[0].offset
    mark = torch.zeros(max(r.last for r in regions) - base + 1, dtype=torch.bool)
    for r in regions:
        Region(r.offset - base, r.size, r.stride).of_tensor(mark).fill_(True)
    return int(mark.sum())


def _share(a: Region, b: Region) -> bool:
    if a == b:
        return True
    base = min(a.offset, b.offset)
    mark = torch.zeros(max(a.last, b.last) - base + 1, dtype=torch.bool)
    a_part, b_part = (Region(r.offset - base, r.size, r.stride).of_tensor(mark) for r in (a, b))
    a_part.fill_(True)
    return bool(b_part.any())


def source_view(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The part of a checkpoint tensor that `region` names; `region` counts contiguous elements.

    A strided tensor whose dimensions the region keeps apart is viewed in place; one where it does
    not is copied to be contiguous first.
    """
    if tensor.is_contiguous():
        return region.of_tensor(tensor)
    mapped = _restride(region, tuple(tensor.shape), tensor.stride())
    if mapped is None:
        return region.of_tensor(tensor.contiguous())
    return mapped.of_tensor(tensor)


def _restride(region: Region, shape: tuple[int, ...], stride: tuple[int, ...]) -> Region | None:
    """`region` of a contiguous tensor of `shape`, moved to one with `stride`; None if it is not
    a box (a region dimension that runs across two of the tensor's)."""
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(step)
        step *= max(n, 1)
    steps.reverse()
    index, rest = [], region.offset
    for s in steps:
        index.append(rest // s)
        rest %= s
    out, used = [], [0] * len(shape)
    for n, s in zip(region.size, region.stride, strict=True):
        if n == 1 or s == 0:
            out.append(0 if s == 0 else 1)
            continue
        dim = next((d for d, st in enumerate(steps) if s % st == 0 and shape[d] > 1), None)
        if dim is None:
            return None
        used[dim] += (n - 1) * (s // steps[dim])
        out.append(s // steps[dim] * stride[dim])
    if any(i + u >= n for i, u, n in zip(index, used, shape, strict=True) if n):
        return None
    offset = sum(i * s for i, s in zip(index, stride, strict=True))
    return Region(offset, region.size, tuple(out))
