"""Patches into live memory: find each element's place, keep what stood there, write, undo.

    flat checkpoint index ── Row ──▶ offset in a live tensor        (or: another rank's element)

The reference is torch, patch by patch; on CUDA `kernels.py` does the same for all patches of a
group in one launch. Time and memory are those of the changed elements, whatever the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from vllm_wt_plugin.sparse.checksum import Place, checksum_change, wrap
from vllm_wt_plugin.sparse.patch import WORDS, Group, ordered

MAX_DIMS = 4
Layers = list[list["Row"]]


@dataclass(frozen=True, slots=True)
class Row:
    """One segment for one live tensor: `dims` are (size, source stride, destination stride), the
    source's outermost first. `dest[0]` is where the element at `offset` goes.

    A (4, 6) checkpoint tensor of which this rank holds columns 3-5, transposed in (3, 4) memory:
    offset 3, dims ((4, 6, 1), (3, 1, 4)).
    """

    dest: torch.Tensor  # 1-d words, from the segment's first element to its last
    offset: int
    dims: tuple[tuple[int, int, int], ...]

    @property
    def source(self) -> tuple[int, tuple[tuple[int, int], ...]]:
        """Which elements of the checkpoint tensor these are; equal for mirrors of one another."""
        flat: list[tuple[int, int]] = []
        for size, stride, _ in self.dims:
            if flat and flat[-1][1] == size * stride:
                flat[-1] = flat[-1][0] * size, stride
            else:
                flat.append((size, stride))
        return self.offset, tuple(flat)

    @property
    def numel(self) -> int:
        n = 1
        for size, *_ in self.dims:
            n *= size
        return n

    def locate(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in `indices` of the elements that lie here, and their offsets in `dest`."""
        rest = indices.long() - self.offset
        inside, at = rest >= 0, torch.zeros_like(rest)
        for size, stride, dest in self.dims:
            step = rest // stride
            inside &= step < size
            at += step * dest
            rest = rest - step * stride
        hit = (inside & (rest == 0)).nonzero().squeeze(1)
        return hit, at[hit]


def row(source: Place, dest: torch.Tensor) -> Row | None:
    """The row of a segment whose live elements are `dest` (same size as `source`).

    None if an index does not tell the place: one source element in several, or a form of more
    than MAX_DIMS dimensions once merged.
    """
    dims: list[tuple[int, int, int]] = []
    order = sorted(zip(source.size, source.stride, dest.stride(), strict=True),
                   key=lambda d: -d[1])  # fmt: skip
    for size, s, d in order:
        if size == 1:
            continue
        if dims and dims[-1][1] == s * size and dims[-1][2] == d * size:
            dims[-1] = dims[-1][0] * size, s, d
        else:
            dims.append((size, s, d))
    dims = dims or [(1, 1, 1)]
    inner = 1  # of the dimensions inside, the extent: strides must leave room for it
    for size, s, _ in reversed(dims):
        if s < inner:
            return None
        inner += (size - 1) * s
    if len(dims) > MAX_DIMS or any(d < 0 for *_, d in dims):
        return None
    word = WORDS[dest.element_size()]
    span = 1 + sum((n - 1) * d for n, _, d in dims)
    whole = dest.as_strided((span,), (1,), dest.storage_offset()).view(word)
    return Row(whole, source.offset, tuple(dims))


def layers(rows: Iterable[Row]) -> Layers | None:
    """Rows of one tensor so that no layer holds an element twice; mirrors go to later layers.

    None where two rows share a part of their elements only. The first layer has every element
    this rank takes exactly once.
    """
    out: Layers = []
    for r in rows:
        for layer in out:
            if all(r.source != other.source for other in layer):
                layer.append(r)
                break
        else:
            out.append([r])
    first = out[0] if out else []
    for i, a in enumerate(first):
        if any(_overlap(a, b) for b in first[i + 1 :]):
            return None
    return out


def _overlap(a: Row, b: Row) -> bool:
    (low, x), (high, y) = sorted(((a.offset, a), (b.offset, b)), key=lambda p: p[0])
    last = low + sum((n - 1) * s for n, s, _ in x.dims)
    if last < high:
        return False
    inside = torch.tensor([high])  # interleaved rows: compare element by element
    for size, stride, _ in y.dims:
        steps = torch.arange(size) * stride
        inside = (inside[:, None] + steps).reshape(-1)
    return bool(x.locate(inside)[0].numel())


class Scatter(Protocol):
    """One group's patches and the places they go to: `check`, then `swap`; `undo` reverts that."""

    def check(self) -> None:
        """Sort what is not in order. Writes nothing live. Raises RequestError naming the parameter
        for an index out of range or given twice."""

    def swap(self) -> list[int]:
        """Write, and keep what stood there, in one pass; per patch, what that added to the
        checksum (this rank's elements)."""

    def undo(self) -> None: ...


class Table(Protocol):
    """Where all tensors of one word and index width lie, prepared once for many pushes."""

    def scatter(self, group: Group) -> Scatter: ...


def table(rows: Mapping[str, Layers], numels: Mapping[str, int], like: Group) -> Table:
    """`rows[name]`: the layers of every tensor of which patches may come, of `numels[name]`
    elements; `like`: a group of the widths and the device that they will have."""
    if like.values.device.type == "cuda":
        from vllm_wt_plugin.sparse.kernels import CudaTable

        return CudaTable(rows, numels, like.indices.dtype, like.values.dtype, like.values.device)
    return TorchTable(rows)


class TorchTable:
    """The reference."""

    def __init__(self, rows: Mapping[str, Layers]) -> None:
        self._rows = rows

    def scatter(self, group: Group) -> Scatter:
        return TorchScatter(group, [self._rows[s.name] for s in group.specs])


class TorchScatter:
    """The reference."""

    def __init__(self, group: Group, rows: Sequence[Layers]) -> None:
        self._group, self._rows = group, rows
        self._undo: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def check(self) -> None:
        self._group = ordered(self._group)

    def swap(self) -> list[int]:
        self._undo = []
        sums = []
        for (spec, indices, values), own in zip(self._group.rows(), self._rows, strict=True):
            total = 0
            for depth, layer in enumerate(own):
                for r in layer:
                    hit, at = r.locate(indices)
                    old, new = r.dest[at], values[hit]
                    self._undo.append((r.dest, at, old))
                    r.dest[at] = new
                    if depth == 0:
                        total += checksum_change(spec.name, indices[hit], old, new)
            sums.append(wrap(total))
        return sums

    def undo(self) -> None:
        for dest, at, old in reversed(self._undo):
            dest[at] = old
