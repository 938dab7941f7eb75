"""Many strided copies in few launches.

The reference is one `copy_` per pair. On CUDA the pairs are described once in a table of
addresses, and a kernel takes a tile of it per program: for a dense model of 400 tensors and for an
MoE of 20,000 the host launches the same handful of kernels. What the kernels cannot express (a
transposed inner dimension) stays a `copy_`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # (destination, source): same shape, maybe another dtype
CASTS = {torch.float32, torch.bfloat16, torch.float16}
TILE = 8192  # words of a one-dimensional tile
ROWS, COLS = 16, 512  # words of a two-dimensional one


@dataclass(frozen=True, slots=True)
class Block:
    """A copy as `rows` runs of `cols` consecutive elements; strides in elements."""

    rows: int
    cols: int
    dst_stride: int
    src_stride: int


def as_block(dst: torch.Tensor, src: torch.Tensor) -> Block | None:
    """The pair as rows of consecutive elements, or None if it has another form.

    (4, 8):(16, 1) ← (4, 8):(8, 1) is 4 rows of 8; both contiguous, it is 1 row of 32.
    """
    dims = sorted(
        (
            (d, s, n)
            for n, d, s in zip(dst.shape, dst.stride(), src.stride(), strict=True)
            if n != 1
        ),
        reverse=True,
    )
    merged: list[tuple[int, int, int]] = []
    for d, s, n in dims:
        if merged and merged[-1][0] == d * n and merged[-1][1] == s * n:
            merged[-1] = (d, s, n * merged[-1][2])
        else:
            merged.append((d, s, n))
    if not merged:
        return Block(1, 1, 0, 0)
    if merged[-1][:2] != (1, 1) or len(merged) > 2:
        return None
    if len(merged) == 1:
        return Block(1, merged[0][2], 0, 0)
    (d, s, rows), (_, _, cols) = merged
    return Block(rows, cols, d, s)


class Batch:
    """Copies fixed places to fixed places, again and again.

    Holds the tensors, so their addresses stay. `run` is asynchronous on the current stream of
    the destinations' device and allocates nothing.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        self.pairs = [(d, s) for d, s in pairs if d.numel()]
        self._single: list[Pair] = []
        self._launches: list[_Launch] = []
        groups: dict[_Kind, list[tuple[Pair, Block]]] = defaultdict(list)
        for dst, src in self.pairs:
            block = as_block(dst, src)
            kind = None if block is None else _kind(dst, src, block)
            if block is None or kind is None:
                self._single.append((dst, src))
            else:
                groups[kind].append(((dst, src), block))
        for kind, rows in groups.items():
            self._launches.append(_Launch(kind, rows))

    def run(self) -> None:
        for launch in self._launches:
            launch.run()
        for dst, src in self._single:
            dst.copy_(src)

    def moving(self, bases: Sequence[int]) -> Moving | None:
        """The same for destinations in tensors that are made anew each time, now at these
        addresses. None where a copy is not done by address."""
        return None if self._single else Moving(self._launches, bases)


class Moving:
    """Copies from fixed places into tensors whose addresses change, and nothing else of them.

    Holds the destinations no longer: whoever runs it has tensors of the same forms there.
    """

    def __init__(self, launches: Sequence[_Launch], bases: Sequence[int]) -> None:
        self._launches, self._bases = launches, list(bases)
        ascending, order = torch.tensor(bases, dtype=torch.int64).sort()
        self._ends: list[list[torch.Tensor]] = []  # of each launch, by tensor: 1 where a copy ends
        for x in launches:
            at = x.table[:, 0].cpu().contiguous()
            owner = order[torch.searchsorted(ascending, at, right=True) - 1]
            ends = [(owner == i).long().to(x.table.device) for i in range(len(bases))]
            self._ends.append(ends)

    def run(self, bases: Sequence[int]) -> bool:
        """Asynchronous. False, with nothing done, where the new addresses are not aligned alike."""
        shifts = [now - then for now, then in zip(bases, self._bases, strict=True)]
        if any(s % 16 for s in shifts):
            return False
        for launch, ends in zip(self._launches, self._ends, strict=True):
            for end, shift in zip(ends, shifts, strict=True):
                if shift:
                    launch.table[:, 0].add_(end, alpha=shift)
        self._bases = list(bases)  # before a launch may fail: the tables are moved
        for launch in self._launches:
            launch.run()
        return True


@dataclass(frozen=True, slots=True)
class _Kind:
    """Pairs that one kernel takes: word types, and whether there are rows."""

    src: str  # triton's names
    dst: str
    flat: bool
    aligned: bool


def _kind(dst: torch.Tensor, src: torch.Tensor, block: Block) -> _Kind | None:
    if dst.device.type != "cuda":
        return None
    if dst.dtype != src.dtype:
        if not {dst.dtype, src.dtype} <= CASTS:
            return None
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        return _Kind(names[src.dtype], names[dst.dtype], block.rows == 1, False)
    size = dst.element_size()
    sizes = [dst.data_ptr(), src.data_ptr(), block.cols * size]
    sizes += [block.dst_stride * size, block.src_stride * size]
    word = next(w for w in (16, 8, 4, 2, 1) if all(x % w == 0 for x in sizes))
    name = {16: "int64", 8: "int64", 4: "int32", 2: "int16", 1: "int8"}[word]
    return _Kind(name, name, block.rows == 1, word == 16)


class _Launch:
    """One kernel launch: its table of copies and its list of tiles, on the device."""

    def __init__(self, kind: _Kind, rows: list[tuple[Pair, Block]]) -> None:
        self.kind = kind
        device = rows[0][0][0].device
        words = {"int64": 8, "int32": 4, "int16": 2, "int8": 1}.get(kind.dst)
        table = []
        for (dst, src), b in rows:
            scale = 1 if words is None else words // dst.element_size() or 1
            # Where the word is smaller than the element (unaligned), count words instead.
            grow = 1 if words is None else max(1, dst.element_size() // words)
            sizes = (b.cols, b.dst_stride, b.src_stride)
            table.append(
                [dst.data_ptr(), src.data_ptr(), b.rows, *(n * grow // scale for n in sizes)]
            )
        t = torch.tensor(table, dtype=torch.int64)
        rows_per, cols_per = (1, TILE) if kind.flat else (ROWS, COLS)
        down = (t[:, 2] + rows_per - 1) // rows_per
        across = (t[:, 3] + cols_per - 1) // cols_per
        counts = down * across
        seg = torch.repeat_interleave(torch.arange(len(table)), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        within = torch.arange(len(seg)) - first
        row0 = within // across[seg] * rows_per
        col0 = within % across[seg] * cols_per
        self.tiles = torch.stack([seg, row0, col0], 1).to(device)
        self.table = t.to(device)

    def run(self) -> None:
        from vllm_wt_plugin.worker.plan import kernels

        with torch.cuda.device(self.table.device):
            kernels.copy(
                self.table, self.tiles, self.kind.src, self.kind.dst,
                flat=self.kind.flat, aligned=self.kind.aligned,
            )  # fmt: skip
