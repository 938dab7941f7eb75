"""The kernels of `diff.py`: both copies are read once, at the speed of the memory.

mark (a bit per element, a count per tile) ─ prefix sum ─▶ find (set bits to indices)
    ─▶ take (values, and what they add to the checksum) ─ (pushed) ─▶ put (into the old copy)

All after the first cost what has changed, not what there is. One launch each for all tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse.diff import Diff, Pair
from vllm_wt_plugin.sparse.kernels import WORD_TYPE, on, patch_tiles, share, span, tiles, to_device
from vllm_wt_plugin.sparse.patch import WORDS, Group, index_dtype

TILE = 8192  # elements compared by one program
CHANGES = 1024  # changed elements that one program takes or puts
WARPS = {"mark": 8, "find": 4, "take": 4}
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


@triton.jit  # type: ignore[untyped-decorator]
def _mark(  # type: ignore[no-untyped-def]
    table, tiles, masks, counts, SRC: tl.constexpr, DST: tl.constexpr, WORD: tl.constexpr,
    PER: tl.constexpr, ALIGN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """table [n, 3]: addresses of new and old, elements. masks [tiles, TILE / 32]: bit b of word w
    is element 32 w + b. PER elements are compared as one word, ALIGN words are 16 bytes. A tensor
    of another launch has no elements in this one's table."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + program * 2) * 3
    n = tl.load(row + 2)
    if n > 0:
        first = tl.multiple_of(tl.load(tiles + program * 2 + 1), TILE)
        left = tl.minimum(n - first, TILE).to(tl.int32)
        if PER > 1:  # a division by 1 would be folded, and what is known of its result with it
            left = left // PER
            first = tl.multiple_of(first // PER, 16)
        new_at = tl.load(row).to(tl.pointer_type(SRC))
        old_at = tl.load(row + 1).to(tl.pointer_type(WORD))
        if ALIGN > 1:  # 16-byte accesses
            left = tl.multiple_of(left, ALIGN)
            new_at = tl.multiple_of(new_at, 16)
            old_at = tl.multiple_of(old_at, 16)
        lane = tl.arange(0, TILE // PER)
        new = _new(new_at + first, lane, lane < left, DST, WORD)
        old = tl.load(old_at + first + lane, mask=lane < left, other=0)
        if PER == 1:
            bits = ((lane < left) & (new != old)).to(tl.int32)
        else:
            differ = (new ^ old).to(tl.uint32, bitcast=True)
            low: tl.constexpr = (1 << (32 // PER)) - 1
            bits = tl.zeros([TILE // PER], tl.int32)
            for k in tl.static_range(PER):
                bits |= (((differ >> (k * (32 // PER))) & low) != 0).to(tl.int32) << k
        grid = tl.reshape(bits, [TILE // 32, 32 // PER])
        words = tl.sum(grid << (tl.arange(0, 32 // PER) * PER)[None, :], 1)
        tl.store(masks + program * (TILE // 32) + tl.arange(0, TILE // 32), words)
        tl.store(counts + program, tl.sum(_population(words.to(tl.uint32, bitcast=True))))


@triton.jit  # type: ignore[untyped-decorator]
def _find(tiles, masks, counts, ends, indices, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each tile's set bits as indices into its tensor, in order, before `ends` of it."""
    program = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + program)
    if count > 0:
        lane = tl.arange(0, TILE // 32)
        left = tl.load(masks + program * (TILE // 32) + lane).to(tl.uint32, bitcast=True)
        many = _population(left)
        out = indices + (tl.load(ends + program) - count)
        to = tl.cumsum(many, 0) - many
        kind = indices.dtype.element_ty
        first = tl.load(tiles + program * 2 + 1).to(kind) + (lane * 32).to(kind)
        for _ in range(tl.max(many, 0)):
            lowest = left & (~left + 1)
            # The exponent of a power of two as a float is the place of its bit.
            bit = (lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(out + to, first + bit.to(kind), mask=left != 0)
            to += 1
            left = left ^ lowest


@triton.jit  # type: ignore[untyped-decorator]
def _take(  # type: ignore[no-untyped-def]
    table, tiles, starts, keys, indices, values, sums, SRC: tl.constexpr, DST: tl.constexpr,
    WORD: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The new values at `indices`, of which `starts[i]` to `starts[i + 1]` are tensor i's."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry, _, at, mask = span(tile, starts, TILE)
    row = table + entry * 3
    if tl.load(row + 2) > 0:
        index = tl.load(indices + at, mask=mask, other=0)
        new = _new(tl.load(row).to(tl.pointer_type(SRC)), index, mask, DST, WORD)
        old = tl.load(tl.load(row + 1).to(tl.pointer_type(WORD)) + index, mask=mask, other=0)
        tl.store(values + at, new, mask=mask)
        key = tl.load(keys + entry).to(tl.uint32)
        moved = share(new, index, key, SIZE, WIDE) - share(old, index, key, SIZE, WIDE)
        tl.atomic_add(sums + entry, tl.sum(moved), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _put(places, tiles, starts, indices, values, WORD: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """places [n]: addresses of the tensors that take the values."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry, _, at, mask = span(tile, starts, TILE)
    index = tl.load(indices + at, mask=mask, other=0)
    place = tl.load(places + entry).to(tl.pointer_type(WORD))
    tl.store(place + index, tl.load(values + at, mask=mask, other=0), mask=mask)


@dataclass(frozen=True, slots=True)
class _Launch:
    """The tensors of one combination of dtypes and alignment; a row for every tensor."""

    table: torch.Tensor
    kind: dict[str, Any]  # SRC, DST, WORD, by element
    mark: dict[str, Any]  # the same by the words that are compared


class CudaPart:
    """`diff.TorchPart` on the pairs' device.

    (4096,) bf16 with changes at 5 and 40: mask words 0 and 1 are 1 << 5 and 1 << 8, the tile's
    count is 2.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._specs = tuple(p.spec for p in pairs)
        self._device = pairs[0].new.device
        self._size = pairs[0].old.element_size()
        self._index = index_dtype(pairs[0].spec.numel)
        self._row = {s.name: i for i, s in enumerate(self._specs)}
        sizes = [s.numel for s in self._specs]
        self._tiles, self._grid = tiles(sizes, self._device, TILE)
        self._last = _last_tiles(sizes).to(self._device)
        self._keys = torch.tensor([cs.seed(s.name) for s in self._specs], device=self._device)
        self._olds = torch.tensor([p.old.data_ptr() for p in pairs], device=self._device)
        direct = [_comparable(p) for p in pairs]
        self._launches: list[_Launch] | None = None
        if all(n is p.new for n, p in zip(direct, pairs, strict=True)):
            self._launches = _launches(pairs, direct)

    def find(self, capacity: int) -> Diff | None:
        device = self._device
        with on(device):
            masks = torch.empty(self._grid, TILE // 32, dtype=torch.int32, device=device)
            counts = torch.empty(self._grid, dtype=torch.int32, device=device)
            fresh = [] if self._launches else [_comparable(p) for p in self._pairs]
            launches = self._launches or _launches(self._pairs, fresh)
            self._mark(launches, masks, counts)
            ends = counts.cumsum(0, dtype=torch.int64)
            starts = torch.nn.functional.pad(ends[self._last], (1, 0))
            stops = starts.tolist()
            total = stops[-1]
            if total > capacity:
                return None
            each = [b - a for a, b in pairwise(stops)]
            indices = torch.empty(total, dtype=self._index, device=device)
            values = torch.empty(total, dtype=WORDS[self._size], device=device)
            sums = torch.zeros(len(each), dtype=torch.int64, device=device)
            if total:
                self._find(masks, counts, ends, indices)
                self._take(launches, each, starts, indices, values, sums)
            moved = sums.tolist()
        kept = [i for i, n in enumerate(each) if n]
        if len(kept) == len(each):
            return Diff(Group(self._specs, tuple(each), indices, values), tuple(moved))
        specs = tuple(self._specs[i] for i in kept)
        group = Group(specs, tuple(each[i] for i in kept), indices, values)
        return Diff(group, tuple(moved[i] for i in kept))

    def _mark(self, launches: list[_Launch], masks: torch.Tensor, counts: torch.Tensor) -> None:
        mark: Any = _mark
        for x in launches:
            mark[self._grid,](
                x.table, self._tiles, masks, counts, **x.mark, TILE=TILE, num_warps=WARPS["mark"]
            )

    def _find(
        self, masks: torch.Tensor, counts: torch.Tensor, ends: torch.Tensor, indices: torch.Tensor
    ) -> None:
        find: Any = _find
        find[self._grid,](
            self._tiles, masks, counts, ends, indices, TILE=TILE, num_warps=WARPS["find"]
        )

    def _take(
        self, launches: list[_Launch], each: list[int], starts: torch.Tensor,
        indices: torch.Tensor, values: torch.Tensor, sums: torch.Tensor,
    ) -> None:  # fmt: skip
        take: Any = _take
        changed, grid = patch_tiles(each, self._device, CHANGES)
        for x in launches:
            take[grid,](
                x.table, changed, starts, self._keys, indices, values, sums, **x.kind,
                SIZE=self._size, WIDE=self._index == torch.int64, TILE=CHANGES,
                num_warps=WARPS["take"],
            )  # fmt: skip

    def accept(self, group: Group) -> None:
        put: Any = _put
        device = self._device
        with on(device):
            changed, grid = patch_tiles(group.counts, device, CHANGES)
            if not grid:
                return
            rows = torch.tensor([[self._row[s.name] for s in group.specs] + [0], group.starts])
            which, starts = to_device(rows, device)
            put[grid,](
                self._olds[which[:-1]], changed, starts, group.indices, group.values,
                WORD=WORD_TYPE[self._size], TILE=CHANGES, num_warps=WARPS["take"],
            )  # fmt: skip


def _launches(pairs: Sequence[Pair], news: Sequence[torch.Tensor]) -> list[_Launch]:
    """A table of addresses for each combination of dtypes and alignment."""
    size = pairs[0].old.element_size()
    word = WORD_TYPE[size]
    rows, groups = [], dict[tuple[Any, Any, bool], list[int]]()
    for i, (p, new) in enumerate(zip(pairs, news, strict=True)):
        row = [new.data_ptr(), p.old.data_ptr(), p.spec.numel]
        rows.append(row)
        same = new.dtype == p.old.dtype or new.dtype not in _FLOAT
        src, dst = (word, word) if same else (_FLOAT[new.dtype], _FLOAT[p.old.dtype])
        aligned = not any(x % 16 for x in (row[0], row[1], row[2] * size))
        groups.setdefault((src, dst, aligned), []).append(i)
    every = torch.tensor(rows)
    out = []
    for (src, dst, aligned), mine in groups.items():
        table = every.clone()
        table[:, 2] = 0
        table[mine, 2] = every[mine, 2]
        kind = {"SRC": src, "DST": dst, "WORD": word}
        mark = kind | {"PER": 1, "ALIGN": 16 // size if aligned else 1}
        if aligned and src == dst and size < 4:
            mark = dict.fromkeys(kind, tl.int32) | {"PER": 4 // size, "ALIGN": 4}
        out.append(_Launch(table.to(news[0].device), kind, mark))
    return out


def _comparable(p: Pair) -> torch.Tensor:
    """The new tensor, contiguous, in a dtype the kernel reads."""
    new = p.new
    if new.dtype != p.old.dtype and not {new.dtype, p.old.dtype} <= _FLOAT.keys():
        new = new.to(p.old.dtype)
    return new.contiguous()


def _last_tiles(counts: Sequence[int]) -> torch.Tensor:
    n = torch.tensor(counts, dtype=torch.int64)
    return ((n + TILE - 1) // TILE).cumsum(0) - 1
