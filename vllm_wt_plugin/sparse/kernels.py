"""Triton kernels for patches; `diff.py`, `scatter.py` and `checksum.py` are their references.

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
from vllm_wt_plugin.sparse.diff import Diff, Pair
from vllm_wt_plugin.sparse.patch import WORDS, Group, index_dtype
from vllm_wt_plugin.sparse.scatter import Row, seeds

TILE = 4096  # elements compared, summed or moved by one program
C_INDEX, C_MIX = tl.constexpr(cs.C_INDEX), tl.constexpr(cs.C_MIX)
C_LANE, C_HIGH = tl.constexpr(cs.C_LANE), tl.constexpr(cs.C_HIGH)
READ, WRITE, UNDO = 0, 1, 2
_WORD = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_FLOAT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
def _lanes(words, index, key, SIZE: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same for elements of SIZE bytes; 8-byte ones are two words at twice the index."""
    if SIZE == 8:
        a, b = _share(words.to(tl.uint32), index * 2, key, True)
        c, d = _share((words >> 32).to(tl.uint32), index * 2 + 1, key, True)
        return a + c, b + d
    if SIZE == 4:
        return _share(words.to(tl.uint32, bitcast=True), index, key, WIDE)
    if SIZE == 2:
        return _share(words.to(tl.uint16, bitcast=True).to(tl.uint32), index, key, WIDE)
    return _share(words.to(tl.uint32), index, key, WIDE)


@triton.jit
def _add(sums, entry, a, b):  # type: ignore[no-untyped-def]
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
                a, b = _lanes(new, index, key, SIZE, WIDE)
                c, d2 = _lanes(old, index, key, SIZE, WIDE)
                _add(sums, entry, tl.where(inside, a - c, 0), tl.where(inside, b - d2, 0))
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
        self._tiles, self._grid = tiles(group.counts, device)
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
        with _on(g.values.device):
            for k, (entries, table) in enumerate(self._layers):
                kernel[self._grid,](
                    entries, table, self._tiles, g.indices, g.values, self._kept[k], self._sums,
                    MODE=mode, SUM=k == 0, DIMS=self._dims, WORD=_WORD[self._size],
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


# ---- diff ---------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _diff(  # type: ignore[no-untyped-def]
    table, tiles, cursor, found, at_index, at_new, at_old, capacity, SRC: tl.constexpr,
    DST: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """table [n, 3]: addresses of new and old, elements. `found` [tiles, 2]: where in the staging
    arrays this tile's changes are, and how many; in order within the tile, tiles in any order."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + program * 2) * 3
    start = tl.load(tiles + program * 2 + 1)
    lane = tl.arange(0, TILE)
    at = start + lane
    mask = at < tl.load(row + 2)
    if SRC == DST:
        new_at = tl.load(row).to(tl.pointer_type(WORD))
        new = tl.load(new_at + at, mask=mask, other=0)
    else:
        wide_at = tl.load(row).to(tl.pointer_type(SRC))
        new = tl.load(wide_at + at, mask=mask, other=0).to(DST).to(WORD, bitcast=True)
    old_at = tl.load(row + 1).to(tl.pointer_type(WORD))
    old = tl.load(old_at + at, mask=mask, other=0)
    changed = mask & (new != old)
    count = tl.sum(changed.to(tl.int32))
    if count > 0:
        base = tl.atomic_add(cursor, count.to(tl.int64), sem="relaxed")
        tl.store(found + program * 2, base)
        tl.store(found + program * 2 + 1, count.to(tl.int64))
        to = base + tl.cumsum(changed.to(tl.int32), 0) - 1
        fits = changed & (to < capacity)
        tl.store(at_index + to, lane.to(tl.int16), mask=fits)
        tl.store(at_new + to, new, mask=fits)
        tl.store(at_old + to, old, mask=fits)


@triton.jit  # type: ignore[untyped-decorator]
def _collect(  # type: ignore[no-untyped-def]
    tiles, keys, found, ends, at_index, at_new, at_old, indices, values, sums,
    SIZE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each tile's changes from where `_diff` left them to their place in the patch."""
    program = tl.program_id(0).to(tl.int64)
    base, count = tl.load(found + program * 2), tl.load(found + program * 2 + 1)
    if count > 0:
        entry, start = tl.load(tiles + program * 2), tl.load(tiles + program * 2 + 1)
        key = tl.load(keys + entry).to(tl.uint32)
        to = tl.load(ends + program) - count
        for i in range(0, count, BLOCK):
            lane = i + tl.arange(0, BLOCK)
            mask = lane < count
            index = start + tl.load(at_index + base + lane, mask=mask, other=0).to(tl.int64)
            new = tl.load(at_new + base + lane, mask=mask, other=0)
            old = tl.load(at_old + base + lane, mask=mask, other=0)
            tl.store(indices + to + lane, index.to(indices.dtype.element_ty), mask=mask)
            tl.store(values + to + lane, new, mask=mask)
            a, b = _lanes(new, index, key, SIZE, WIDE)
            c, d = _lanes(old, index, key, SIZE, WIDE)
            _add(sums, entry, tl.where(mask, a - c, 0), tl.where(mask, b - d, 0))


def cuda_diff(pairs: Sequence[Pair], capacity: int) -> Diff | None:
    """`diff.torch_diff` in two launches: one reads both copies once and stages the changes by
    tile, the other puts the tiles in order. Pairs of one word and index width."""
    device, size = pairs[0].new.device, pairs[0].old.element_size()
    word, index = WORDS[size], index_dtype(pairs[0].spec.numel)
    capacity = min(capacity, sum(p.spec.numel for p in pairs))
    cursor = torch.zeros(1, dtype=torch.int64, device=device)
    at_index = torch.empty(capacity, dtype=torch.int16, device=device)
    at_new = torch.empty(capacity, dtype=word, device=device)
    at_old = torch.empty(capacity, dtype=word, device=device)
    counts = [p.spec.numel for p in pairs]
    all_tiles, grid = tiles(counts, device)
    found = torch.zeros(grid, 2, dtype=torch.int64, device=device)
    news = [_comparable(p) for p in pairs]
    by_dtype: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (p, new) in enumerate(zip(pairs, news, strict=True)):
        same = new.dtype == p.old.dtype or new.dtype not in _FLOAT
        by_dtype.setdefault((word, word) if same else (new.dtype, p.old.dtype), []).append(i)
    kernel: Any = _diff
    with _on(device):
        for (src, dst), mine in by_dtype.items():
            # Every launch sees all tensors; those of other dtypes have no elements in its table.
            chosen = set(mine)
            table = torch.tensor(
                [
                    [n.data_ptr(), p.old.data_ptr(), p.spec.numel if i in chosen else 0]
                    for i, (p, n) in enumerate(zip(pairs, news, strict=True))
                ],
                device=device,
            )
            kernel[grid,](
                table, all_tiles, cursor, found, at_index, at_new, at_old, capacity,
                SRC=_FLOAT.get(src, _WORD[size]), DST=_FLOAT.get(dst, _WORD[size]),
                WORD=_WORD[size], SIZE=size, TILE=TILE, num_warps=8,
            )  # fmt: skip
        total = int(cursor)
        if total > capacity:
            return None
        return _ordered(pairs, (at_index, at_new, at_old), all_tiles, found, total, index)


def _ordered(
    pairs: Sequence[Pair], staged: tuple[torch.Tensor, ...], all_tiles: torch.Tensor,
    found: torch.Tensor, total: int, index: torch.dtype,
) -> Diff:  # fmt: skip
    device, size = staged[1].device, staged[1].element_size()
    indices = torch.empty(total, dtype=index, device=device)
    values = torch.empty(total, dtype=staged[1].dtype, device=device)
    sums = torch.zeros(len(pairs), 2, dtype=torch.int32, device=device)
    ends = found[:, 1].cumsum(0)
    keys = torch.tensor([cs.seed(p.spec.name) for p in pairs], device=device)
    if total:
        collect: Any = _collect
        collect[found.shape[0],](
            all_tiles, keys, found, ends, *staged, indices, values, sums,
            SIZE=size, WIDE=index == torch.int64, BLOCK=256, num_warps=2,
        )  # fmt: skip
    last = _last_tiles([p.spec.numel for p in pairs]).to(device)
    stops = ends[last].tolist()
    counts = [b - a for a, b in zip([0, *stops], stops, strict=False)]
    kept = [i for i, n in enumerate(counts) if n]
    every = as_sums(sums)
    group = Group(
        tuple(pairs[i].spec for i in kept), tuple(counts[i] for i in kept), indices, values
    )
    return Diff(group, tuple(every[i] for i in kept))


def _comparable(p: Pair) -> torch.Tensor:
    """The new tensor, contiguous, in a dtype the kernel reads."""
    new = p.new
    if new.dtype != p.old.dtype and not {new.dtype, p.old.dtype} <= _FLOAT.keys():
        new = new.to(p.old.dtype)
    return new.contiguous()


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
    a, b = _lanes(words, index, tl.load(row + 3).to(tl.uint32), SIZE, WIDE)
    _add(sums, entry, tl.where(mask, a, 0), tl.where(mask, b, 0))


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
        all_tiles, grid = tiles(counts, device)
        sums = torch.zeros(len(mine), 2, dtype=torch.int32, device=device)
        with _on(device):
            whole[grid,](
                torch.tensor(table, device=device), all_tiles, sums, DIMS=dims, WORD=_WORD[size],
                SIZE=size, WIDE=max(counts) > 2**31, TILE=TILE, num_warps=8,
            )  # fmt: skip
        for i, s in zip(mine, as_sums(sums), strict=True):
            out[i] = s
    return out


# ---- tables -------------------------------------------------------------------------------


def tiles(counts: Sequence[int], device: torch.device) -> tuple[torch.Tensor, int]:
    """(tensor, first element) of every tile, [n, 2] on the device, and n."""
    n = torch.tensor(counts, dtype=torch.int64)
    per = (n + TILE - 1) // TILE
    total = int(per.sum())
    per = per.to(device)
    which = torch.repeat_interleave(per, output_size=total)
    within = torch.arange(total, device=device) - (per.cumsum(0) - per)[which]
    return torch.stack([which, within * TILE], 1), total


def _last_tiles(counts: Sequence[int]) -> torch.Tensor:
    n = torch.tensor(counts, dtype=torch.int64)
    return ((n + TILE - 1) // TILE).cumsum(0) - 1


def as_sums(lanes: torch.Tensor) -> list[Sum]:
    return [Sum(a & cs.MASK, b & cs.MASK) for a, b in lanes.tolist()]


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch there; on the CPU it is Triton's interpreter that runs, in tests."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
