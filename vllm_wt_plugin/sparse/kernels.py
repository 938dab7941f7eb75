"""Triton kernels for patches, and what other kernels share; `scatter.py` is the reference.

A program takes one tile of one tensor, so 400 tensors and 20,000 are the same few launches. What
a program needs to know is a row of integers in a table on the device.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import triton
import triton.language as tl

from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse.patch import Group, ordered
from vllm_wt_plugin.sparse.scatter import Layers

PATCH = 1024  # elements of a patch that one program takes
WARPS = {"check": 2, "swap": 8}
C_INDEX, C_MIX, C_HIGH = tl.constexpr(cs.C_INDEX), tl.constexpr(cs.C_MIX), tl.constexpr(cs.C_HIGH)
WORD_TYPE = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


# ---- what the kernels share ---------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def mix(word, key, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """`checksum.mix` of 4-byte words at these places, in 32 bits."""
    x = word.to(tl.uint32) * C_INDEX + key
    if WIDE:
        x += (word >> 32).to(tl.uint32) * C_HIGH
    x = (x ^ (x >> 16)) * C_MIX
    return (x ^ (x >> 15)) | 1


@triton.jit
def product(bits, factor):  # type: ignore[no-untyped-def]
    return (bits.to(tl.uint64) * factor.to(tl.uint64)).to(tl.int64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def share(words, index, key, SIZE: tl.constexpr, WIDE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What each element of SIZE bytes adds to the checksum, int64."""
    if SIZE == 8:
        twice = index.to(tl.int64) * 2  # a narrow index has no upper half to shift down
        low = product(words.to(tl.uint32), mix(twice, key, True))
        return low + product((words >> 32).to(tl.uint32), mix(twice + 1, key, True))
    if SIZE == 4:
        return product(words.to(tl.uint32, bitcast=True), mix(index, key, WIDE))
    if SIZE == 2:
        bits = words.to(tl.uint16, bitcast=True).to(tl.uint32)
        return product(bits << ((index & 1) * 16).to(tl.uint32), mix(index >> 1, key, WIDE))
    bits = words.to(tl.uint32) << ((index & 3) * 8).to(tl.uint32)
    return product(bits, mix(index >> 2, key, WIDE))


# ---- scatter ------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def span(patches, n, program, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a program has of n `Patches`: which one, of which entry, where that begins in the group,
    where the program does, and how many elements are left from there."""
    own = tl.zeros([], tl.int64)
    end = own + n
    while end - own > 1:
        middle = (own + end) // 2
        if tl.load(patches + middle) <= program:
            own = middle
        else:
            end = middle
    patch = patches + own
    begin = tl.load(patch + n + 1)
    at = begin + (program - tl.load(patch)) * TILE
    left = tl.minimum(tl.load(patch + n + 2) - at, TILE).to(tl.int32)
    return own, tl.load(patch + 2 * (n + 1)), begin, at, left


@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _check(entries, patches, n, indices, bad, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Counts in `bad` the indices that do not ascend within their patch, or are out of range."""
    _, entry, begin, at, left = span(patches, n, tl.program_id(0), TILE)
    lane = tl.arange(0, TILE)
    mask = lane < left
    index = tl.load(indices + at + lane, mask=mask, other=0)
    before = tl.load(indices + at - 1 + lane, mask=mask & (lane + at > begin), other=-1)
    far = tl.load(entries + entry * 4 + 3)
    wrong = tl.sum((mask & ((index <= before) | (index >= far))).to(tl.int32))
    if wrong > 0:
        tl.atomic_add(bad, wrong.to(tl.int64), sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _place(row, index, mask, DIMS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where in a row's tensor these elements lie, and whether they do."""
    rest = index - tl.load(row + 1).to(index.dtype)
    inside = mask & (rest >= 0)
    offset = tl.zeros(index.shape, tl.int64)
    for d in tl.static_range(DIMS):
        stride = tl.load(row + 3 + 3 * d).to(index.dtype)
        step = rest
        if stride != 1:  # most tensors are one run: a division takes as long as the memory
            step = rest // stride
        inside = inside & (step < tl.load(row + 2 + 3 * d))
        offset += step.to(tl.int64) * tl.load(row + 4 + 3 * d)
        rest = rest - step * stride
    return offset, inside & (rest == 0)


@triton.jit(do_not_specialize=["n", "programs"])  # type: ignore[untyped-decorator]
def _swap(  # type: ignore[no-untyped-def]
    entries, rows, patches, n, programs, indices, values, kept, moved, UNDO: tl.constexpr,
    FIRST: tl.constexpr, DIMS: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """entries [m, 4]: first row, end row, seed, elements. rows [k, 2 + 3 DIMS]: address, source
    offset, (size, source stride, destination stride) per dimension. moved [n]: what each patch
    adds to the checksum. What `programs` would do is shared by those there are.

    A store waits for what stood there, and so for its 32 bytes to be in the cache: one that finds
    them on their way is made at the memory instead, which takes two to four times as long."""
    for program in range(tl.program_id(0), programs, tl.num_programs(0)):
        patch, entry, _, at, left = span(patches, n, program, TILE)
        own = entries + entry * 4
        lane = tl.arange(0, TILE)
        mask = lane < left
        index = tl.load(indices + at + lane, mask=mask, other=0)
        key = tl.load(own + 2).to(tl.uint32)
        added = tl.zeros([], tl.int64)
        for r in range(tl.load(own), tl.load(own + 1)):
            row = rows + r * (2 + 3 * DIMS)
            offset, inside = _place(row, index, mask, DIMS)
            dest = tl.load(row).to(tl.pointer_type(WORD))
            new = tl.load((kept if UNDO else values) + at + lane, mask=inside, other=0)
            old = tl.load(dest + offset, mask=inside, other=0)
            tl.store(dest + offset, new, mask=inside & (new != old))
            if not UNDO:
                tl.store(kept + at + lane, old, mask=inside)
                if FIRST:
                    change = share(new, index, key, SIZE, WIDE) - share(old, index, key, SIZE, WIDE)
                    added += tl.sum(tl.where(inside, change, 0))
        if FIRST and not UNDO:
            tl.atomic_add(moved + patch, added, sem="relaxed")


class Patches:
    """Patches that lie one behind the other in their group, for `span`: `counts[i]` elements belong
    to entry `entries[i]` of some table. Each has programs of its own, `grid` in all.

    Counts 300, 0, 40 of entries 5, 6, 7: rows (first program, first element, entry) are
    0, 2, 2, 3 | 0, 300, 300, 340 | 5, 6, 7, 0.
    """

    def __init__(self, counts: Sequence[int], entries: torch.Tensor, device: torch.device) -> None:
        count = torch.frombuffer(array("q", [0, *counts]), dtype=torch.int64)
        programs = ((count + (PATCH - 1)) // PATCH).cumsum(0)
        self.n, self.grid = len(counts), int(programs[-1])
        self.rows = to_device(torch.stack([programs, count.cumsum(0), entries]), device)


def entry_rows(rows: Iterable[int]) -> torch.Tensor:
    """`Patches`' entries, and one that nobody reads."""
    return torch.tensor([*rows, 0])


@dataclass(frozen=True, slots=True)
class _Layer:
    entries: torch.Tensor
    rows: torch.Tensor


class CudaTable:
    """`scatter.table` on a device: one row of numbers for every tensor and every segment.

    `apart`: up to this share of changed elements, one program on a processor at a time. The memory
    opens a row for each of them then, and more at once get in each other's way.
    """

    apart = 0.02

    def __init__(
        self, rows: Mapping[str, Layers], numels: Mapping[str, int], index: torch.dtype,
        word: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self._held = rows  # the memory whose addresses the table has
        self._ids = {name: i for i, name in enumerate(rows)}
        self._named: tuple[object, torch.Tensor, int] = (), entry_rows(()), 0
        self._numels, self.processors = numels, processors(device)
        self.size, self.wide = word.itemsize, index == torch.int64
        every = [r for own in rows.values() for layer in own for r in layer]
        self.dims = max((len(r.dims) for r in every), default=1)
        depth = max((len(own) for own in rows.values()), default=1)
        self.layers = [self._layer(k, numels, device) for k in range(max(depth, 1))]

    def _layer(self, k: int, numels: Mapping[str, int], device: torch.device) -> _Layer:
        entries, table = [], list[list[int]]()
        far = 2**62 if self.wide else 2**31 - 1  # a dimension of one step, beyond every index
        for name, own in self._held.items():
            layer = own[k] if k < len(own) else []
            entries.append([len(table), len(table) + len(layer), cs.seed(name), numels[name]])
            for r in layer:
                pad = [1, far, 0] * (self.dims - len(r.dims))
                table.append([r.dest.data_ptr(), r.offset, *pad, *(x for d in r.dims for x in d)])
        table = table or [[0] * (2 + 3 * self.dims)]
        return _Layer(torch.tensor(entries, device=device), torch.tensor(table, device=device))

    def scatter(self, group: Group) -> CudaScatter:
        return CudaScatter(self, group)

    def entries(self, group: Group) -> tuple[torch.Tensor, int]:
        """Of its tensors, and their elements; a trainer pushes the same ones again and again."""
        if group.specs is not self._named[0]:
            names = [s.name for s in group.specs]
            every = sum(self._numels[n] for n in names)
            self._named = group.specs, entry_rows(self._ids[n] for n in names), every
        return self._named[1:]


class CudaScatter:
    """`scatter.TorchScatter` in one launch per layer. `undo` is asynchronous."""

    def __init__(self, table: CudaTable, group: Group) -> None:
        self._table, self._group = table, group
        entries, elements = table.entries(group)
        self._patches = Patches(group.counts, entries, group.values.device)
        apart = group.values.numel() <= table.apart * elements
        self._grid = min(self._patches.grid, table.processors) if apart else self._patches.grid
        self._kept = [torch.empty_like(group.values) for _ in table.layers]
        self._swapped = 0  # layers, whose old values are in `_kept`

    def check(self) -> None:
        g, p, check = self._group, self._patches, cast(Any, _check)
        if not p.grid:
            return
        with on(g.values.device):
            bad = torch.zeros(1, dtype=torch.int64, device=g.values.device)
            check[p.grid,](
                self._table.layers[0].entries, p.rows, p.n, g.indices, bad, TILE=PATCH,
                num_warps=WARPS["check"],
            )  # fmt: skip
            if bad.item():
                self._group = ordered(g)

    def swap(self) -> list[int]:
        moved = torch.zeros(self._patches.n, dtype=torch.int64, device=self._group.values.device)
        self._launch(moved, undo=False)
        sums: list[int] = moved.tolist()
        return sums

    def undo(self) -> None:
        self._launch(None, undo=True)

    def _launch(self, moved: torch.Tensor | None, *, undo: bool) -> None:
        g, p, table, swap = self._group, self._patches, self._table, cast(Any, _swap)
        if not p.grid:
            return
        with on(g.values.device):
            for k, layer in enumerate(table.layers[: self._swapped if undo else None]):
                swap[self._grid,](
                    layer.entries, layer.rows, p.rows, p.n, p.grid, g.indices, g.values,
                    self._kept[k], moved, UNDO=undo, FIRST=k == 0, DIMS=table.dims,
                    WORD=WORD_TYPE[table.size], SIZE=table.size, WIDE=table.wide, TILE=PATCH,
                    num_warps=WARPS["swap"],
                )  # fmt: skip
                self._swapped = max(self._swapped, k + 1)


# ---- tables -------------------------------------------------------------------------------


def tiles(counts: Sequence[int], device: torch.device, size: int) -> tuple[torch.Tensor, int]:
    """(tensor, first element) of every tile of `size`, [n, 2] on the device, and n."""
    n = torch.tensor(counts, dtype=torch.int64)
    per = (n + size - 1) // size
    total = int(per.sum())
    per = to_device(per, device)
    which = torch.repeat_interleave(per, output_size=total)
    within = torch.arange(total, device=device) - (per.cumsum(0) - per)[which]
    return torch.stack([which, within * size], 1), total


def to_device(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor there. Does not wait for what the stream has to do before, as a copy out of
    pageable memory would."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t


def processors(device: torch.device) -> int:
    """How many the device has; of the CPU, as Triton's interpreter is, any few."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on(device: torch.device) -> AbstractContextManager[object]:
    """Launch there; on the CPU it is Triton's interpreter that runs, in tests."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
