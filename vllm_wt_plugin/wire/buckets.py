"""How a stream of tensors is cut into bounded buffers: one pure function, called on both sides.

Trainer and workers compute the same buckets from the same specs, so a bucket travels as a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire.params import ParamSpec

# Rows in buffers of one size; a tensor by itself; vLLM's own.
Geometry = Literal["rows", "apart", "vllm"]
ALIGN = 256  # bytes; what copies and views of any dtype want


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `[row, row + rows)` (of the first dimension) of one tensor, at a byte of the buffer."""

    spec: ParamSpec
    row: int
    rows: int
    offset: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.spec.shape[1:]) if self.spec.shape else ()

    @property
    def nbytes(self) -> int:
        return row_bytes(self.spec) * self.rows


Bucket = list[Piece]


def row_bytes(spec: ParamSpec) -> int:
    """Bytes of one row; a 0-d tensor is one row."""
    return spec.nbytes // spec.shape[0] if spec.shape and spec.shape[0] else spec.nbytes


def cut(specs: Iterable[ParamSpec], buffer_bytes: int) -> list[list[Piece]]:
    """Fill buffers of `buffer_bytes` in order; a tensor that does not fit is split between rows.

    (6, 100) bf16 in buffers of 512 bytes: rows 0-1, 2-3 and 4-5. Raises RequestError where one
    row is larger than a buffer.
    """
    buckets: list[list[Piece]] = []
    current: list[Piece] = []
    used = 0
    for spec in specs:
        row, total = 0, spec.shape[0] if spec.shape else 1
        if not spec.numel:
            continue
        size = row_bytes(spec)
        if size > buffer_bytes:
            raise RequestError(
                f"one row of this tensor has {size} bytes, a buffer {buffer_bytes}",
                where=spec.name,
                next_step="raise buffer_bytes",
            )
        while row < total:
            fit = min(total - row, (buffer_bytes - used) // size)
            if fit <= 0:
                buckets.append(current)
                current, used = [], 0
                continue
            current.append(Piece(spec, row, fit, used))
            used += -(-fit * size // ALIGN) * ALIGN
            row += fit
    return [*buckets, current] if current else buckets


def apart(specs: Iterable[ParamSpec]) -> list[list[Piece]]:
    """A bucket for each tensor that has elements."""
    return [[Piece(s, 0, s.shape[0] if s.shape else 1, 0)] for s in specs if s.numel]


def cut_as_vllm(specs: Iterable[ParamSpec], buffer_bytes: int) -> list[list[Piece]]:
    """The buckets of vLLM's own packed trainers (its `weight_transfer/packed_tensor.py`): whole
    tensors without gaps; a bucket ends with the tensor that takes it beyond `buffer_bytes`."""
    buckets: list[list[Piece]] = []
    current: list[Piece] = []
    used = 0
    for spec in specs:
        if not spec.numel:
            continue
        current.append(Piece(spec, 0, spec.shape[0] if spec.shape else 1, used))
        used += spec.nbytes
        if used > buffer_bytes:
            buckets.append(current)
            current, used = [], 0
    return [*buckets, current] if current else buckets


def buckets_of(specs: Iterable[ParamSpec], geometry: Geometry, buffer_bytes: int) -> list[Bucket]:
    """How these tensors travel. Raises RequestError as `cut`."""
    if geometry == "apart":
        return apart(specs)
    return (cut if geometry == "rows" else cut_as_vllm)(specs, buffer_bytes)


def size(bucket: list[Piece]) -> int:
    """Bytes of a buffer that a bucket fills."""
    return bucket[-1].offset + bucket[-1].nbytes
