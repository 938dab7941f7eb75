"""Checksums of whole tensors on CUDA; `checksum.py` has the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import triton
import triton.language as tl

from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse.kernels import WORD_TYPE, mix, on, product, share, tiles, to_device
from vllm_wt_plugin.sparse.scatter import Row

TILE = 8192  # words summed by one program
WARPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _run(rows, tiles, sums, WIDE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words in a run. rows [n, 4]: address (of 16 bytes), first word, words (a multiple of 4),
    seed."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile)
    row = rows + entry * 4
    start = tl.multiple_of(tl.load(tile + 1), TILE)
    left = tl.multiple_of(tl.minimum(tl.load(row + 2) - start, TILE).to(tl.int32), 4)
    lane = tl.arange(0, TILE)
    run = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16) + start
    words = tl.load(run + lane, mask=lane < left, other=0).to(tl.uint32, bitcast=True)
    first, key = tl.load(row + 1) + start, tl.load(row + 3).to(tl.uint32)
    place = first + lane if WIDE else first.to(tl.uint32) + lane.to(tl.uint32)
    total = tl.sum(product(words, mix(place, key, WIDE)))
    tl.atomic_add(sums + entry, total, sem="relaxed")


@triton.jit  # type: ignore[untyped-decorator]
def _strided(  # type: ignore[no-untyped-def]
    rows, tiles, sums, DIMS: tl.constexpr, WORD: tl.constexpr, SIZE: tl.constexpr,
    WIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """rows [n, 4 + 3 DIMS]: address, source offset, elements, seed, then as in `kernels._swap`."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 2
    entry = tl.load(tile)
    row = rows + entry * (4 + 3 * DIMS)
    KIND: tl.constexpr = tl.int64 if WIDE else tl.int32
    rest = (tl.load(tile + 1) + tl.arange(0, TILE)).to(KIND)
    mask = rest < tl.load(row + 2)
    index = tl.zeros([TILE], KIND) + tl.load(row + 1).to(KIND)
    offset = tl.zeros([TILE], tl.int64)
    for k in tl.static_range(DIMS):
        dim = row + 4 + 3 * (DIMS - 1 - k)
        if k == DIMS - 1:
            step = rest
        else:
            size = tl.load(dim).to(KIND)
            step = rest % size
            rest = rest // size
        index += step * tl.load(dim + 1).to(KIND)
        offset += step.to(tl.int64) * tl.load(dim + 2)
    words = tl.load(tl.load(row).to(tl.pointer_type(WORD)) + offset, mask=mask, other=0)
    total = share(words, index, tl.load(row + 3).to(tl.uint32), SIZE, WIDE)
    tl.atomic_add(sums + entry, tl.sum(total), sem="relaxed")


class CudaSums:
    """`checksum.checksum_region` of many (seed, live elements), as often as wanted: on each device
    a launch for all that are a run of whole words, one more for each other form. It knows where the
    elements lie; that they stay there is up to whoever begins a sum.
    """

    def __init__(self, parts: Sequence[tuple[int, Row]]) -> None:
        self._count = len(parts)
        forms: dict[tuple[torch.device, tuple[int, int, bool]], list[int]] = {}
        for i, (_, r) in enumerate(parts):
            forms.setdefault((r.dest.device, _form(r)), []).append(i)
        self._forms = [
            (mine, _Summed([parts[i] for i in mine], *form)) for (_, form), mine in forms.items()
        ]

    def begin(self) -> Callable[[], list[int]]:
        """On the current streams. What is returned waits for them, and gives the sums in the order
        of the parts."""
        begun = [(mine, form.begin(), _stream(form.device)) for mine, form in self._forms]

        def result() -> list[int]:
            out = [0] * self._count
            for mine, sums, stream in begun:
                with torch.cuda.stream(stream):
                    for i, s in zip(mine, sums.tolist(), strict=True):
                        out[i] = s
            return out

        return result


def _stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _form(r: Row) -> tuple[int, int, bool]:
    """Dimensions (0: a run of words), bytes per element, and whether indices need 64 bits."""
    size = r.dest.element_size()
    last = r.offset + sum((n - 1) * s for n, s, _ in r.dims)
    bytes_ = (r.offset * size, r.numel * size, r.dest.data_ptr())
    if len(r.dims) == 1 and r.dims[0][1:] == (1, 1) and not any(x % 16 for x in bytes_):
        return 0, 4, (last + 1) * size // 4 > cs.MASK
    return len(r.dims), size, last >= 2**31


class _Summed:
    """Parts of one form on one device."""

    def __init__(self, parts: Sequence[tuple[int, Row]], dims: int, size: int, wide: bool) -> None:
        self.device = parts[0][1].dest.device
        self._count, self._dims, self._size, self._wide = len(parts), dims, size, wide
        if dims:
            table = [
                [r.dest.data_ptr(), r.offset, r.numel, key, *(x for d in r.dims for x in d)]
                for key, r in parts
            ]
        else:
            bytes_ = [r.dest.element_size() for _, r in parts]
            table = [
                [r.dest.data_ptr(), r.offset * b // 4, r.numel * b // 4, key]
                for (key, r), b in zip(parts, bytes_, strict=True)
            ]
        self._tiles, self._grid = tiles([row[2] for row in table], self.device, TILE)
        self._rows = to_device(torch.tensor(table), self.device)

    def begin(self) -> torch.Tensor:
        sums = torch.zeros(self._count, dtype=torch.int64, device=self.device)
        how = {"WIDE": self._wide, "TILE": TILE, "num_warps": WARPS}
        run, strided = cast(Any, _run), cast(Any, _strided)
        with on(self.device):
            if self._dims:
                strided[self._grid,](
                    self._rows, self._tiles, sums, DIMS=self._dims, WORD=WORD_TYPE[self._size],
                    SIZE=self._size, **how,
                )  # fmt: skip
            else:
                run[self._grid,](self._rows, self._tiles, sums, **how)
        return sums
