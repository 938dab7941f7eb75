"""Is a tensor that lies in memory box by box one strided view of it? Integers only.

Each `Box` says where some elements of a contiguous tensor are: a q_proj inside a fused qkv is one
box, fused experts are one box per expert and projection. `view_of` finds the offset and strides
that hold for all of them, or says why there are none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from vllm_wt_plugin.wire.handles import contiguous_stride


@dataclass(frozen=True, slots=True)
class Box:
    """Element `index + Σ i·index_stride` of the tensor lies at `offset + Σ i·stride`; i < size."""

    size: tuple[int, ...]
    index: int
    index_stride: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]


class NoView(ValueError):
    """Why the memory is not one view."""


@dataclass(frozen=True, slots=True)
class _Aligned:
    """A box along the tensor's own dimensions: (count, step, stride in memory) for each."""

    start: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(n for n, _, _ in self.steps)

    @property
    def ranges(self) -> list[range]:
        pairs = zip(self.start, self.steps, strict=True)
        return [range(i, i + n * step, step) for i, (n, step, _) in pairs]


def view_of(shape: tuple[int, ...], boxes: Iterable[Box]) -> tuple[int, tuple[int, ...]]:
    """Offset and strides (elements of the memory) of the whole tensor. Raises NoView.

    ((2, 3), boxes of row 0 at 10 and of row 1 at 20, both stride 1) → (10, (10, 1)).
    """
    parts = [_align(box, shape) for box in dict.fromkeys(boxes)]
    _check_cover(parts, shape)
    first = next(p for p in parts if not any(p.start))
    strides = _strides(parts, first.offset, shape)
    for p in parts:
        there = first.offset + sum(i * s for i, s in zip(p.start, strides, strict=True))
        regular = all(
            n == 1 or step * s == memory
            for (n, step, memory), s in zip(p.steps, strides, strict=True)
        )
        if there != p.offset or not regular:
            raise NoView("its parts do not lie at equal distances")
    return first.offset, strides


def _align(box: Box, shape: tuple[int, ...]) -> _Aligned:
    steps = contiguous_stride(shape)
    start, rest = [], box.index
    for s in steps:
        start.append(rest // s)
        rest %= s
    found: dict[int, tuple[int, int, int]] = {}
    todo = list(zip(box.size, box.index_stride, box.stride, strict=True))
    while todo:
        n, s, memory = todo.pop()
        if n == 1:
            continue
        dim = next((d for d, c in enumerate(steps) if s and s % c == 0 and shape[d] > 1), None)
        if dim is None or dim in found:
            raise NoView("an element of it is in several places")
        room, step = shape[dim] - start[dim], s // steps[dim]
        fits = -(-room // step)
        if n > fits:  # it runs on into the next larger dimension
            if start[dim] or shape[dim] % step or n % fits:
                raise NoView("it is copied in parts that are no boxes")
            todo.append((n // fits, s * fits, memory * fits))
        found[dim] = (min(n, fits), step, memory)
    return _Aligned(
        tuple(start), tuple(found.get(d, (1, 1, 0)) for d in range(len(shape))), box.offset
    )


def _check_cover(parts: list[_Aligned], shape: tuple[int, ...]) -> None:
    """Every element once."""
    have, need = sum(p.numel for p in parts), math.prod(shape)
    if have < need:
        raise NoView(f"{need - have} of its {need} elements are not in vLLM's memory")
    steps = contiguous_stride(shape)

    def extent(p: _Aligned) -> tuple[int, int]:
        pairs = list(zip(p.ranges, steps, strict=True))
        return sum(r[0] * s for r, s in pairs), sum(r[-1] * s for r, s in pairs)

    open_: list[tuple[int, _Aligned]] = []
    for (low, high), part in sorted(((extent(p), p) for p in parts), key=lambda row: row[0]):
        open_ = [(end, o) for end, o in open_ if end >= low]
        for _, other in open_:
            if all(_meet(a, b) for a, b in zip(other.ranges, part.ranges, strict=True)):
                raise NoView("an element of it is in several places")
        open_.append((high, part))


def _meet(a: range, b: range) -> bool:
    return bool(set(a) & set(b)) if a.step > 1 or b.step > 1 else a[0] <= b[-1] and b[0] <= a[-1]


def _strides(parts: list[_Aligned], base: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The stride of each dimension, from within a box or from one box to another."""
    known: dict[int, int] = {}
    for p in parts:
        for d, (n, step, memory) in enumerate(p.steps):
            if n > 1:
                known.setdefault(d, memory // step)
    grew = True
    while grew:
        grew = False
        for p in parts:
            unknown = [d for d, i in enumerate(p.start) if i and d not in known]
            if len(unknown) == 1:
                d = unknown[0]
                rest = p.offset - base - sum(p.start[k] * s for k, s in known.items())
                known[d], grew = rest // p.start[d], True
    for d in reversed(range(len(shape))):
        if shape[d] == 1 or d not in known:  # counts nothing; as a contiguous tensor has it
            after = d + 1 < len(shape)
            known[d] = known[d + 1] * shape[d + 1] if after else 1
    return tuple(known[d] for d in range(len(shape)))
