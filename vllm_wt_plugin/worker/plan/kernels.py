"""Triton kernels of the batched copy; `batch.py` is their checking launcher and reference."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from vllm_wt_plugin.worker.plan.batch import COLS, ROWS, TILE

WARPS = 4
_WORDS = {
    "int64": tl.int64, "int32": tl.int32, "int16": tl.int16, "int8": tl.int8,
    "fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16,
}  # fmt: skip


def copy(
    table: torch.Tensor,
    tiles: torch.Tensor,
    src: str,
    dst: str,
    *,
    flat: bool,
    aligned: bool,
) -> None:
    """Launch on the current stream. `table` [n, 6] and `tiles` [m, 3] are int64 on the device:
    (dst address, src address, rows, cols, dst stride, src stride), (copy, first row, first col).

    One copy of 20,000 words is 3 tiles: (0, 0, 0), (0, 0, 8192), (0, 0, 16384).
    """
    kernel: Any = _flat if flat else _rows
    sizes = {"TILE": TILE} if flat else {"ROWS": ROWS, "COLS": COLS}
    # A program per tile: on an H200 6 % faster than persistent programs that walk the tiles.
    kernel[tiles.shape[0],](
        table, tiles, SRC=_WORDS[src], DST=_WORDS[dst], ALIGNED=aligned,
        num_warps=WARPS, **sizes,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _flat(  # type: ignore[no-untyped-def]
    table, tiles, SRC: tl.constexpr, DST: tl.constexpr,
    ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    row = table + tl.load(tile) * 6
    dst = tl.load(row).to(tl.pointer_type(DST))
    src = tl.load(row + 1).to(tl.pointer_type(SRC))
    n = tl.load(row + 3)
    at = tl.multiple_of(tl.load(tile + 2), TILE) + tl.arange(0, TILE)
    if ALIGNED:  # 16-byte accesses
        dst = tl.multiple_of(dst, 16)
        src = tl.multiple_of(src, 16)
        n = tl.multiple_of(n, 2)
    tl.store(dst + at, tl.load(src + at, mask=at < n).to(DST), mask=at < n)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    table, tiles, SRC: tl.constexpr, DST: tl.constexpr,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0).to(tl.int64) * 3
    row = table + tl.load(tile) * 6
    dst = tl.load(row).to(tl.pointer_type(DST))
    src = tl.load(row + 1).to(tl.pointer_type(SRC))
    n_rows, n_cols = tl.load(row + 2), tl.load(row + 3)
    dst_stride, src_stride = tl.load(row + 4), tl.load(row + 5)
    r = tl.load(tile + 1) + tl.arange(0, ROWS)[:, None]
    c = tl.multiple_of(tl.load(tile + 2), COLS) + tl.arange(0, COLS)[None, :]
    if ALIGNED:
        dst = tl.multiple_of(dst, 16)
        src = tl.multiple_of(src, 16)
        n_cols = tl.multiple_of(n_cols, 2)
        dst_stride = tl.multiple_of(dst_stride, 2)
        src_stride = tl.multiple_of(src_stride, 2)
    mask = (r < n_rows) & (c < n_cols)
    values = tl.load(src + r * src_stride + c, mask=mask)
    tl.store(dst + r * dst_stride + c, values.to(DST), mask=mask)
