"""Triton kernels for patches; `scatter.py` and `checksum.py` are their references.

A program takes one tile of one tensor, so 400 tensors and 20,000 are the same few launches. What
a program needs to know is a row of integers in a table on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse.checksum import Sum
from vllm_wt_plugin.sparse.patch import Group
from vllm_wt_plugin.sparse.scatter import Row, seeds

TILE = 4096  # elements compared, summed or moved by one program
C_INDEX, C_MIX = tl.constexpr(cs.C_INDEX), tl.constexpr(cs.C_MIX)
C_LANE, C_HIGH = tl.constexpr(cs.C_LANE), tl.constexpr(cs.C_HIGH)
READ, WRITE, UNDO = 0, 1, 2
WORD_TYPE = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


# ---- what the kernels share ---------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _share(values, index, key, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The two lanes' products of 32-bit words at flat indices: `checksum.mix`."""
    x = index.to(tl.uint32) * C_INDEX + key
    if WIDE:
        x += (index >> 32).to(tl.uint32) * C_HIGH
    x = (x ^ (x >> 16)) * C_MIX
    x = x ^ (x >> 15)
    y = x * C_LANE
    y = y ^ (y >> 16)
    return values * (x | 1), values * (y | 1)


@triton.jit  # type: ignore[untyped-decorator]
def lanes(words, index, key, SIZE: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for elements of SIZE bytes; 8-byte ones are two words at twice the index."""
    if SIZE == 8:
        twice = index.to(tl.int64) * 2  # a narrow index has no upper half to shift down
        a, b = _share(words.to(tl.uint32), twice, key, True)
        c, d = _share((words >> 32).to(tl.uint32), twice + 1, key, True)
        return a + c, b + d
    if SIZE == 4:
        return _share(words.to(tl.uint32, bitcast=True), index, key, WIDE)
    if SIZE == 2:
        return _share(words.to(tl.uint16, bitcast=True).to(tl.uint32), index, key, WIDE)
    return _share(words.to(tl.uint32), index, key, WIDE)


@triton.jit
def add(sums, entry, a, b):  # type: ignore[no-untyped-def]
    tl.atomic_add(sums + entry * 2, tl.sum(a.to(tl.int32, bitcast=True)), sem="relaxed")
    tl.atomic_add(sums + entry * 2 + 1, tl.sum(b.to(tl.int32, bitcast=True)), sem="relaxed")


# ---- scatter ------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _scatter(  # type: ignore[no-untyped-def]
    entries, rows, tiles, indices, values, kept, sums, MODE: tl.constexpr, SUM: tl.constexpr,
    DIMS: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """entries [n, 5]: first element, end, first row, end row, seed. rows [m, 2 + 3 DIMS]:
    address, source offset, (size, source stride, destination stride) per dimension."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile)
    own = entries + entry * 5
    at = tl.load(own) + tl.load(tile + 1) + tl.arange(0, TILE)
    mask = at < tl.load(own + 1)
    index = tl.load(indices + at, mask=mask, other=0)
    new = tl.load(values + at, mask=mask, other=0)
    key = tl.load(own + 4).to(tl.uint32)
    first, end = tl.load(own + 2), tl.load(own + 3)
    for r in range(first, end):
        row = rows + r * (2 + 3 * DIMS)
        dest = tl.load(row).to(tl.pointer_type(WORD))
        rest = index - tl.load(row + 1).to(index.dtype)
        inside = mask & (rest >= 0)
        offset = tl.zeros([TILE], tl.int64)
        for d in tl.static_range(DIMS):
            stride = tl.load(row + 3 + 3 * d).to(index.dtype)
            step = rest // stride
            inside = inside & (step < tl.load(row + 2 + 3 * d))
            offset += step.to(tl.int64) * tl.load(row + 4 + 3 * d)
            rest = rest - step * stride
        inside = inside & (rest == 0)
        if MODE == 0:
            old = tl.load(dest + offset, mask=inside, other=0)
            tl.store(kept + at, old, mask=inside)
            if SUM:
                a, b = lanes(new, index, key, SIZE, WIDE)
                c, d2 = lanes(old, index, key, SIZE, WIDE)
                add(sums, entry, tl.where(inside, a - c, 0), tl.where(inside, b - d2, 0))
        else:
            value = new if MODE == 1 else tl.load(kept + at, mask=inside, other=0)
            tl.store(dest + offset, value, mask=inside)


class CudaScatter:
    """`scatter.TorchScatter` in one launch per layer and step. Asynchronous, but for `read`."""

    def __init__(self, group: Group, rows: Sequence[list[list[Row]]]) -> None:
        self._group, device = group, group.values.device
        self._held = rows  # the memory whose addresses the tables have
        self._size = group.values.element_size()
        self._wide = group.indices.dtype == torch.int64
        self._dims = max((len(r.dims) for own in rows for ly in own for r in ly), default=1)
        self._tiles, self._grid = tiles(group.counts, device, TILE)
        depth = max((len(own) for own in rows), default=0)
        self._layers = [self._tables([own[k] if k < len(own) else [] for own in rows])
                        for k in range(depth)]  # fmt: skip
        self._kept = [torch.empty_like(group.values) for _ in range(depth)]
        self._sums = torch.zeros(len(group.specs), 2, dtype=torch.int32, device=device)

    def _tables(self, layer: list[list[Row]]) -> tuple[torch.Tensor, torch.Tensor]:
        entries: list[list[int]] = []
        table: list[list[int]] = []
        far = 2**31 - 1  # a dimension of one step, beyond every index
        bounds = zip(self._group.starts, self._group.starts[1:], seeds(self._group), layer,
                     strict=False)  # fmt: skip
        for start, stop, key, own in bounds:
            entries.append([start, stop, len(table), len(table) + len(own), key])
            for r in own:
                pad = [1, far if not self._wide else 2**62, 0] * (self._dims - len(r.dims))
                dims = [x for d in r.dims for x in d]
                table.append([r.dest.data_ptr(), r.offset, *pad, *dims])
        table = table or [[0] * (2 + 3 * self._dims)]
        device = self._group.values.device
        return torch.tensor(entries, device=device), torch.tensor(table, device=device)

    def _launch(self, mode: int) -> None:
        g = self._group
        kernel: Any = _scatter
        if not self._grid:
            return
        with on(g.values.device):
            for k, (entries, table) in enumerate(self._layers):
                kernel[self._grid,](
                    entries, table, self._tiles, g.indices, g.values, self._kept[k], self._sums,
                    MODE=mode, SUM=k == 0, DIMS=self._dims, WORD=WORD_TYPE[self._size],
                    SIZE=self._size, WIDE=self._wide, TILE=TILE, num_warps=8,
                )  # fmt: skip

    def read(self) -> list[Sum]:
        self._sums.zero_()
        self._launch(READ)
        return as_sums(self._sums)

    def write(self) -> None:
        self._launch(WRITE)

    def undo(self) -> None:
        self._launch(UNDO)


# ---- whole tensors ------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _whole(  # type: ignore[no-untyped-def]
    rows, tiles, sums, DIMS: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """rows [n, 4 + 3 DIMS]: address, source offset, elements, seed, then as in `_scatter`."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile)
    row = rows + entry * (4 + 3 * DIMS)
    j = tl.load(tile + 1) + tl.arange(0, TILE)
    mask = j < tl.load(row + 2)
    index = tl.zeros([TILE], tl.int64) + tl.load(row + 1)
    offset = tl.zeros([TILE], tl.int64)
    rest = j
    for k in tl.static_range(DIMS):
        dim = row + 4 + 3 * (DIMS - 1 - k)
        if k == DIMS - 1:
            step = rest
        else:
            size = tl.load(dim)
            step = rest % size
            rest = rest // size
        index += step * tl.load(dim + 1)
        offset += step * tl.load(dim + 2)
    words = tl.load(tl.load(row).to(tl.pointer_type(WORD)) + offset, mask=mask, other=0)
    a, b = lanes(words, index, tl.load(row + 3).to(tl.uint32), SIZE, WIDE)
    add(sums, entry, tl.where(mask, a, 0), tl.where(mask, b, 0))


def cuda_sums(parts: Sequence[tuple[int, Row]]) -> list[Sum]:
    """`checksum.checksum_region` of many (seed, live elements), one launch per word width."""
    out: list[Sum] = [cs.ZERO] * len(parts)
    whole: Any = _whole
    sizes = {r.dest.element_size() for _, r in parts}
    for size in sizes:
        mine = [i for i, (_, r) in enumerate(parts) if r.dest.element_size() == size]
        dims = max(len(parts[i][1].dims) for i in mine)
        table = []
        for key, r in (parts[i] for i in mine):
            pad = [1, 0, 0] * (dims - len(r.dims))
            flat = [x for d in r.dims for x in d]
            table.append([r.dest.data_ptr(), r.offset, r.numel, key, *pad, *flat])
        device = parts[mine[0]][1].dest.device
        counts = [parts[i][1].numel for i in mine]
        all_tiles, grid = tiles(counts, device, TILE)
        sums = torch.zeros(len(mine), 2, dtype=torch.int32, device=device)
        with on(device):
            whole[grid,](
                torch.tensor(table, device=device), all_tiles, sums, DIMS=dims,
                WORD=WORD_TYPE[size], SIZE=size, WIDE=max(counts) > 2**31, TILE=TILE, num_warps=8,
            )  # fmt: skip
        for i, s in zip(mine, as_sums(sums), strict=True):
            out[i] = s
    return out


# ---- tables -------------------------------------------------------------------------------


def tiles(counts: Sequence[int], device: torch.device, size: int) -> tuple[torch.Tensor, int]:
    """(tensor, first element) of every tile of `size`, [n, 2] on the device, and n."""
    n = torch.tensor(counts, dtype=torch.int64)
    per = (n + size - 1) // size
    total = int(per.sum())
    per = per.to(device)
    which = torch.repeat_interleave(per, output_size=total)
    within = torch.arange(total, device=device) - (per.cumsum(0) - per)[which]
    return torch.stack([which, within * size], 1), total


def as_sums(lanes: torch.Tensor) -> list[Sum]:
    return [Sum(a & cs.MASK, b & cs.MASK) for a, b in lanes.tolist()]


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch there; on the CPU it is Triton's interpreter that runs, in tests."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
