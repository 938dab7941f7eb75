"""The kernels of `diff.py`: both copies are read once, at the speed of the memory.

mark (a bit per element, a count per tile) ─ prefix sum ─▶ compact (set bits to indices, values)

The second kernel steps from set bit to set bit: what it costs depends on what has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse.diff import Diff, Pair
from vllm_wt_plugin.sparse.kernels import WORD_TYPE, add, as_sums, lanes, on, tiles
from vllm_wt_plugin.sparse.patch import WORDS, Group, index_dtype

TILE = 8192  # elements compared by one program
_FLOAT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit  # type: ignore[untyped-decorator]
def _new(  # type: ignore[no-untyped-def]
    row, at, mask, SRC: tl.constexpr, DST: tl.constexpr, WORD: tl.constexpr, ALIGNED: tl.constexpr
):
    """The trainer's elements as words of the served dtype."""
    if SRC == DST:
        same = tl.load(row).to(tl.pointer_type(WORD))
        if ALIGNED:
            same = tl.multiple_of(same, 16)
        return tl.load(same + at, mask=mask, other=0)
    wide = tl.load(row).to(tl.pointer_type(SRC))
    return tl.load(wide + at, mask=mask, other=0).to(DST).to(WORD, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _mark(  # type: ignore[no-untyped-def]
    table, tiles, masks, counts, SRC: tl.constexpr, DST: tl.constexpr, WORD: tl.constexpr,
    SIZE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """table [n, 3]: addresses of new and old, elements. masks [tiles, TILE / 32]: bit b of word w
    is element 32 w + b. A tensor of another launch has no elements in this one's table."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(tiles + program * 2) * 3
    n = tl.load(row + 2)
    if n > 0:
        at = tl.multiple_of(tl.load(tiles + program * 2 + 1), TILE) + tl.arange(0, TILE)
        old_at = tl.load(row + 1).to(tl.pointer_type(WORD))
        if ALIGNED:  # 16-byte accesses
            n = tl.multiple_of(n, 16 // SIZE)
            old_at = tl.multiple_of(old_at, 16)
        mask = at < n
        new = _new(row, at, mask, SRC, DST, WORD, ALIGNED)
        old = tl.load(old_at + at, mask=mask, other=0)
        changed = (mask & (new != old)).to(tl.int32)
        bits = tl.reshape(changed, [TILE // 32, 32]) << tl.arange(0, 32)[None, :]
        tl.store(masks + program * (TILE // 32) + tl.arange(0, TILE // 32), tl.sum(bits, 1))
        tl.store(counts + program, tl.sum(changed))


@triton.jit
def _population(x):  # type: ignore[no-untyped-def]
    """How many bits of each 32-bit word are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit  # type: ignore[untyped-decorator]
def _compact(  # type: ignore[no-untyped-def]
    table, tiles, keys, masks, counts, ends, indices, values, sums, SRC: tl.constexpr,
    DST: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Each tile's changes, in order, before `ends` of it."""
    program = tl.program_id(0).to(tl.int64)
    entry, count = tl.load(tiles + program * 2), tl.load(counts + program)
    row = table + entry * 3
    if (count > 0) & (tl.load(row + 2) > 0):
        lane = tl.arange(0, TILE // 32)
        left = tl.load(masks + program * (TILE // 32) + lane).to(tl.uint32, bitcast=True)
        many = _population(left)
        to = tl.load(ends + program) - count + (tl.cumsum(many, 0) - many)
        first = tl.load(tiles + program * 2 + 1) + lane * 32
        old_at = tl.load(row + 1).to(tl.pointer_type(WORD))
        key = tl.load(keys + entry).to(tl.uint32)
        sum_a = tl.zeros([TILE // 32], tl.uint32)
        sum_b = tl.zeros([TILE // 32], tl.uint32)
        for _ in range(tl.max(many, 0)):
            live = left != 0
            lowest = left & (~left + 1)
            index = first + _population(lowest - 1)
            old = tl.load(old_at + index, mask=live, other=0)
            new = _new(row, index, live, SRC, DST, WORD, False)
            tl.store(indices + to, index.to(indices.dtype.element_ty), mask=live)
            tl.store(values + to, new, mask=live)
            a, b = lanes(new, index, key, SIZE, WIDE)
            c, d = lanes(old, index, key, SIZE, WIDE)
            sum_a += tl.where(live, a - c, 0)
            sum_b += tl.where(live, b - d, 0)
            to += live.to(tl.int64)
            left = left ^ lowest
        add(sums, entry, sum_a, sum_b)


def cuda_diff(pairs: Sequence[Pair], capacity: int) -> Diff | None:
    """`diff.torch_diff` for pairs of one word and index width, on their device. Blocking.

    Temporary memory: a bit per element. (4096,) bf16 with changes at 5 and 40: mask words 0 and 1
    are 1 << 5 and 1 << 8, the tile's count is 2.
    """
    device, size = pairs[0].new.device, pairs[0].old.element_size()
    sizes = [p.spec.numel for p in pairs]
    all_tiles, grid = tiles(sizes, device, TILE)
    masks = torch.empty(grid, TILE // 32, dtype=torch.int32, device=device)
    counts = torch.empty(grid, dtype=torch.int32, device=device)
    mark: Any = _mark
    with on(device):
        launches = _launches(pairs, [_comparable(p) for p in pairs])
        for table, kind, aligned in launches:
            mark[grid,](
                table, all_tiles, masks, counts, **kind, ALIGNED=aligned, TILE=TILE, num_warps=8
            )
        ends = counts.cumsum(0, dtype=torch.int64)
        last = _last_tiles(sizes).to(device)
        stops = ends[last].tolist()
        total = stops[-1]
        if total > capacity:
            return None
        index = index_dtype(pairs[0].spec.numel)
        indices = torch.empty(total, dtype=index, device=device)
        values = torch.empty(total, dtype=WORDS[size], device=device)
        sums = torch.zeros(len(pairs), 2, dtype=torch.int32, device=device)
        if total:
            keys = torch.tensor([cs.seed(p.spec.name) for p in pairs], device=device)
            compact: Any = _compact
            for table, kind, _ in launches:
                compact[grid,](
                    table, all_tiles, keys, masks, counts, ends, indices, values, sums, **kind,
                    WIDE=index == torch.int64, TILE=TILE, num_warps=4,
                )  # fmt: skip
        every = as_sums(sums)
    each = [b - a for a, b in zip([0, *stops], stops, strict=False)]
    kept = [i for i, n in enumerate(each) if n]
    specs = tuple(pairs[i].spec for i in kept)
    group = Group(specs, tuple(each[i] for i in kept), indices, values)
    return Diff(group, tuple(every[i] for i in kept))


_Launch = tuple[torch.Tensor, dict[str, Any], bool]


def _launches(pairs: Sequence[Pair], news: Sequence[torch.Tensor]) -> list[_Launch]:
    """A table of addresses for each combination of dtypes and alignment."""
    size = pairs[0].old.element_size()
    word = WORD_TYPE[size]
    groups: dict[tuple[Any, Any, bool], set[int]] = {}
    for i, (p, new) in enumerate(zip(pairs, news, strict=True)):
        places = (new.data_ptr(), p.old.data_ptr(), p.spec.numel * size)
        aligned = all(x % 16 == 0 for x in places)
        same = new.dtype == p.old.dtype or new.dtype not in _FLOAT
        src, dst = (word, word) if same else (_FLOAT[new.dtype], _FLOAT[p.old.dtype])
        groups.setdefault((src, dst, aligned), set()).add(i)
    out = []
    for (src, dst, aligned), mine in groups.items():
        rows = [
            [n.data_ptr(), p.old.data_ptr(), p.spec.numel if i in mine else 0]
            for i, (p, n) in enumerate(zip(pairs, news, strict=True))
        ]
        kind = {"SRC": src, "DST": dst, "WORD": word, "SIZE": size}
        out.append((torch.tensor(rows, device=news[0].device), kind, aligned))
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
