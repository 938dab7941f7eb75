"""The kernels of `diff.py`: both copies are read once, at the speed of the memory.

find (a tile's changes, wherever there is room, how many, and what they add to the checksum)
    ─ prefix sum ─▶ move (in order) ─ (pushed) ─▶ put (into the old copy)

All after the first cost what has changed, not what there is. One launch each for all tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse.diff import Diff, Pair
from vllm_wt_plugin.sparse.kernels import (
    PATCH,
    WARPS,
    WORD_TYPE,
    Patches,
    entry_rows,
    on,
    share,
    span,
    tiles,
)
from vllm_wt_plugin.sparse.patch import WORDS, Group, index_dtype

TILE = 8192  # elements compared by one program
TAKEN = 1024  # of a tile's changes, so many at a time
MOVED = 512  # places for changed elements that one program moves at a time
FIRST = 256  # a first comparison has room for one change in so many elements
_FLOAT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def _new(place, at, mask, DST: tl.constexpr, WORD: tl.constexpr):  # type: ignore[no-untyped-def]
    """The trainer's elements as words of the served dtype."""
    values = tl.load(place + at, mask=mask, other=0)
    if place.dtype.element_ty == DST:
        return values
    return values.to(DST).to(WORD, bitcast=True)


@triton.jit
def _population(x):  # type: ignore[no-untyped-def]
    """How many bits of each 32-bit word are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _list(words, many, to, first):  # type: ignore[no-untyped-def]
    """The places of bits that are set, `many` in each word, in order; bit 0 of the first word is
    `first`."""
    places = tl.cumsum(many, 0) - many
    kind = to.dtype.element_ty
    begin = first.to(kind) + (tl.arange(0, words.shape[0]) * 32).to(kind)
    for _ in range(tl.max(many, 0)):
        lowest = words & (~words + 1)
        # The exponent of a power of two as a float is the place of its bit.
        bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(to + places, begin + bit.to(kind), mask=words != 0)
        places += 1
        words = words ^ lowest


@triton.jit  # type: ignore[untyped-decorator]
def _take(  # type: ignore[no-untyped-def]
    row, key, indices, values, count, SRC: tl.constexpr, DST: tl.constexpr, WORD: tl.constexpr,
    SIZE: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The new values of `count` elements, and what they add to the checksum. Neighbours lie on
    neighbouring threads, so this takes a fraction of the accesses that it would while listing."""
    new_at = tl.load(row).to(tl.pointer_type(SRC))
    old_at = tl.load(row + 1).to(tl.pointer_type(WORD))
    added = tl.zeros([LANES], tl.int64)
    for k in range(0, count, LANES):
        at = k + tl.arange(0, LANES)
        index = tl.load(indices + at, mask=at < count, other=0)
        new = _new(new_at, index, at < count, DST, WORD)
        old = tl.load(old_at + index, mask=at < count, other=0)
        tl.store(values + at, new, mask=at < count)
        added += share(new, index, key, SIZE, WIDE) - share(old, index, key, SIZE, WIDE)
    return tl.sum(added)


@triton.jit(do_not_specialize=["room"])  # type: ignore[untyped-decorator]
def _find(  # type: ignore[no-untyped-def]
    table, tiles, keys, found, starts, counts, moved, indices, values, room, SRC: tl.constexpr,
    DST: tl.constexpr, WORD: tl.constexpr, WIDER: tl.constexpr, PER: tl.constexpr,
    ALIGN: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, LANES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """table [n, 3]: addresses of new and old, elements. tiles [m, 3]: tensor, first element, which
    of all tiles it is. `found` counts all changes; those of a tile lie from its `starts` on, in
    order, as far as there is `room`; `moved`: what they add to the checksum. PER elements are
    compared as one WIDER, of which ALIGN are 16 bytes."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    tensor = tl.load(tile)
    row = table + tensor * 3
    first = tl.multiple_of(tl.load(tile + 1), TILE)
    left = tl.minimum(tl.load(row + 2) - first, TILE).to(tl.int32)
    begin = first
    if PER > 1:  # a division by 1 would be folded, and what is known of its result with it
        left = left // PER
        begin = tl.multiple_of(first // PER, 16)
    new_run = tl.load(row).to(tl.pointer_type(SRC if PER == 1 else WIDER))
    old_run = tl.load(row + 1).to(tl.pointer_type(WIDER))
    if ALIGN > 1:  # 16-byte accesses
        left = tl.multiple_of(left, ALIGN)
        new_run = tl.multiple_of(new_run, 16)
        old_run = tl.multiple_of(old_run, 16)
    lane = tl.arange(0, TILE // PER)
    old = tl.load(old_run + begin + lane, mask=lane < left, other=0)
    if PER == 1:
        new = _new(new_run + begin, lane, lane < left, DST, WORD)
        bits = ((lane < left) & (new != old)).to(tl.int32)
    else:
        new = tl.load(new_run + begin + lane, mask=lane < left, other=0)
        differ = (new ^ old).to(tl.uint32, bitcast=True)
        low: tl.constexpr = (1 << (32 // PER)) - 1
        bits = tl.zeros([TILE // PER], tl.int32)
        for k in tl.static_range(PER):
            bits |= (((differ >> (k * (32 // PER))) & low) != 0).to(tl.int32) << k
    grid = tl.reshape(bits, [TILE // 32, 32 // PER])
    words = tl.sum(grid << (tl.arange(0, 32 // PER) * PER)[None, :], 1).to(tl.uint32, bitcast=True)
    many = _population(words)  # bit b of word w is element 32 w + b
    count = tl.sum(many)
    to = tl.atomic_add(found, count.to(tl.int64), sem="relaxed")
    which = tl.load(tile + 2)
    tl.store(starts + which, to)
    tl.store(counts + which, count)
    added = tl.zeros([], tl.int64)
    if (count > 0) & (to + count <= room):
        _list(words, many, indices + to, first)
        tl.debug_barrier()  # the indices are read by other threads
        key = tl.load(keys + tensor).to(tl.uint32)
        added = _take(row, key, indices + to, values + to, count, SRC, DST, WORD, SIZE, WIDE, LANES)
    tl.store(moved + which, added)


@triton.jit(do_not_specialize=["room"])  # type: ignore[untyped-decorator]
def _move(  # type: ignore[no-untyped-def]
    n, starts, counts, ends, indices, values, to_indices, to_values, room, TILES: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The changes of n tiles, TILES by one program, to before their `ends`. Where there was too
    little room it does not matter."""
    tile = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    count = tl.load(counts + tile, mask=tile < n, other=0)
    source = tl.load(starts + tile, mask=tile < n, other=0)
    end = tl.load(ends + tile, mask=tile < n, other=0)
    to = end - count
    count = tl.where((source + count <= room) & (end <= room), count, 0)
    for k in range(0, tl.max(count, 0), LANES):
        at = k + tl.arange(0, LANES)[None, :]
        here = at < count[:, None]
        index = tl.load(indices + source[:, None] + at, mask=here, other=0)
        value = tl.load(values + source[:, None] + at, mask=here, other=0)
        tl.store(to_indices + to[:, None] + at, index, mask=here)
        tl.store(to_values + to[:, None] + at, value, mask=here)


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _put(  # type: ignore[no-untyped-def]
    places, patches, n, indices, values, HOST: tl.constexpr, WORD: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """places [n]: addresses of the tensors that take the values. A place is read first, as in
    `_swap`: what is written to memory that is not in the cache takes up to three times as long.
    Not the host's, which is in no cache of ours."""
    _, which, _, at, left = span(patches, n, tl.program_id(0), TILE)
    lane = tl.arange(0, TILE)
    mask = lane < left
    index = tl.load(indices + at + lane, mask=mask, other=0)
    new = tl.load(values + at + lane, mask=mask, other=0)
    place = tl.load(places + which).to(tl.pointer_type(WORD))
    if not HOST:
        mask = mask & (new != tl.load(place + index, mask=mask, other=0))
    tl.store(place + index, new, mask=mask)


@dataclass(frozen=True, slots=True)
class _Launch:
    """The tensors of one combination of dtypes and alignment."""

    tiles: torch.Tensor
    kind: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Found:
    """Indices and new values of all changes, if there was `room`; `sums` [2, n]: after each tensor,
    how many they are, and by how much the checksums have moved until there."""

    indices: torch.Tensor
    values: torch.Tensor
    sums: torch.Tensor
    room: int


class CudaPart:
    """`diff.TorchPart` on the pairs' device.

    (16384,) bf16 with changes at 5, 9000 and 40: counts of its two tiles are 2 and 1. If the second
    was first, the indices found are 9000, 5, 40 and the starts 1 and 0; in order, 5, 40, 9000.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._specs = tuple(p.spec for p in pairs)
        self._device = pairs[0].new.device
        self._size = pairs[0].old.element_size()
        self._index = index_dtype(pairs[0].spec.numel)
        self._row = {s.name: i for i, s in enumerate(self._specs)}
        sizes = [s.numel for s in self._specs]
        every, self._grid = tiles(sizes, self._device, TILE)
        self._last = _last_tiles(sizes).to(self._device)
        self._keys = torch.tensor([cs.seed(s.name) for s in self._specs], device=self._device)
        self._olds = torch.tensor([p.old.data_ptr() for p in pairs], device=self._device)
        direct = [_comparable(p) for p in pairs]
        self._launches = _launches(pairs, direct, every)
        same = all(n is p.new for n, p in zip(direct, pairs, strict=True))
        self._table = _table(pairs, direct) if same else None
        self._room = self._first = max(sum(sizes) // FIRST, TILE)
        self._lanes = 8

    def begin(self) -> Callable[[int], Diff | None]:
        fresh: list[torch.Tensor] = []
        try:
            if self._table is None:
                with on(self._device):
                    fresh += (_comparable(p) for p in self._pairs)
            return partial(self._result, fresh, [self._found(fresh, self._room)])
        except torch.cuda.OutOfMemoryError:
            return lambda _: None

    def _result(
        self, fresh: list[torch.Tensor], begun: list[_Found | None], capacity: int
    ) -> Diff | None:
        """Takes what was `begun`; `fresh`: the new tensors, or copies made to be compared."""
        while (found := begun.pop()) is not None:
            ends, moved = found.sums.tolist()
            if (total := ends[-1]) > capacity:
                break
            if total <= found.room:
                fresh.clear()
                return self._diff(found, total, ends, moved)
            del found  # its memory is free for the next one
            begun.append(self._found(fresh, total))
        else:
            self._room = self._first
        fresh.clear()
        return None

    def _diff(self, found: _Found, total: int, ends: list[int], moved: list[int]) -> Diff:
        indices, values = found.indices, found.values
        self._room = total + total // 8 + TILE  # of the next one, if about as much changes
        self._lanes = min(max(triton.next_power_of_2(total // self._grid), 8), MOVED)
        each = [b - a for a, b in pairwise([0, *ends])]
        sums = [cs.wrap(b - a) for a, b in pairwise([0, *moved])]
        kept = [i for i, n in enumerate(each) if n]
        if len(kept) < len(each):
            each, sums = [each[i] for i in kept], [sums[i] for i in kept]
        specs = self._specs if len(kept) == len(self._specs) else [self._specs[i] for i in kept]
        return Diff(Group(tuple(specs), tuple(each), indices[:total], values[:total]), tuple(sums))

    def _found(self, fresh: list[torch.Tensor], room: int) -> _Found | None:
        """None without memory for it. Asynchronous."""
        with on(self._device):
            table = _table(self._pairs, fresh) if self._table is None else self._table
            try:
                return self._launched(table, room)
            except torch.cuda.OutOfMemoryError:
                return None

    def _launched(self, table: torch.Tensor, room: int) -> _Found:
        found = [self._empty(room, d) for d in (self._index, WORDS[self._size])]
        starts, moved = (self._empty(self._grid, torch.int64) for _ in range(2))
        counts = self._empty(self._grid, torch.int32)
        total = torch.zeros(1, dtype=torch.int64, device=self._device)
        find: Any = _find
        for x in self._launches:
            find[x.tiles.shape[0],](
                table, x.tiles, self._keys, total, starts, counts, moved, *found, room,
                **x.kind, SIZE=self._size, WIDE=self._index == torch.int64, LANES=TAKEN, TILE=TILE,
                num_warps=4 if x.kind["PER"] > 1 else 8,
            )  # fmt: skip
        ends = counts.cumsum(0, dtype=torch.int64)
        indices, values = (torch.empty_like(t) for t in found)
        at_once = MOVED // self._lanes
        move: Any = _move
        move[triton.cdiv(self._grid, at_once),](
            self._grid, starts, counts, ends, *found, indices, values, room, TILES=at_once,
            LANES=self._lanes, num_warps=4,
        )  # fmt: skip
        # The sums overflow, as the checksums do.
        sums = torch.stack([ends, moved.cumsum(0)])[:, self._last]
        return _Found(indices, values, sums, room)

    def _empty(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(n, dtype=dtype, device=self._device)

    def accept(self, group: Group) -> None:
        if not group.indices.numel():
            return
        put: Any = _put
        with on(self._device):
            rows = entry_rows(self._row[s.name] for s in group.specs)
            patches = Patches(group.counts, rows, self._device)
            put[patches.grid,](
                self._olds, patches.rows, patches.n, group.indices, group.values,
                HOST=not self._pairs[0].old.is_cuda, WORD=WORD_TYPE[self._size], TILE=PATCH,
                num_warps=WARPS["swap"],
            )  # fmt: skip


def _launches(
    pairs: Sequence[Pair], news: Sequence[torch.Tensor], every: torch.Tensor
) -> list[_Launch]:
    """The tiles of each combination of dtypes and alignment. What is made anew for each comparison
    has the alignment of an allocation."""
    size = pairs[0].old.element_size()
    word = WORD_TYPE[size]
    groups = dict[tuple[Any, Any, bool], list[int]]()
    for i, (p, new) in enumerate(zip(pairs, news, strict=True)):
        same = new.dtype == p.old.dtype or new.dtype not in _FLOAT
        src, dst = (word, word) if same else (_FLOAT[new.dtype], _FLOAT[p.old.dtype])
        bytes_ = new.data_ptr(), p.old.data_ptr(), p.spec.numel * size
        groups.setdefault((src, dst, not any(x % 16 for x in bytes_)), []).append(i)
    out = []
    for (src, dst, aligned), mine in groups.items():
        own = torch.isin(every[:, 0], torch.tensor(mine, device=every.device)).nonzero()
        kind = {"SRC": src, "DST": dst, "WORD": word, "WIDER": word, "PER": 1}
        kind["ALIGN"] = 16 // size if aligned else 1
        if aligned and src == dst and size < 4:
            kind |= {"WIDER": tl.int32, "PER": 4 // size, "ALIGN": 4}
        out.append(_Launch(torch.cat([every[own[:, 0]], own], 1), kind))
    return out


def _table(pairs: Sequence[Pair], news: Sequence[torch.Tensor]) -> torch.Tensor:
    rows = [
        [new.data_ptr(), p.old.data_ptr(), p.spec.numel] for p, new in zip(pairs, news, strict=True)
    ]
    return torch.tensor(rows, device=news[0].device)


def _comparable(p: Pair) -> torch.Tensor:
    """The new tensor, contiguous, in a dtype the kernel reads."""
    new = p.new
    if new.dtype != p.old.dtype and not {new.dtype, p.old.dtype} <= _FLOAT.keys():
        new = new.to(p.old.dtype)
    return new.contiguous()


def _last_tiles(counts: Sequence[int]) -> torch.Tensor:
    n = torch.tensor(counts, dtype=torch.int64)
    return ((n + TILE - 1) // TILE).cumsum(0) - 1
