"""Checksums that survive sharding: a sum over elements, so ranks add up and patches move it.

    H(T) = Σ bits(T[i]) · mix(name, i)  mod 2^32, in two lanes

`i` is the flat index in the checkpoint tensor, whoever holds the element, so shards of any form
add up to the whole, and a patch moves H by Σ (new − old) · mix(i). Factors are odd: a single
flipped bit always shows. With one lane two exchanged values that differ in a high bit alone would
pass once in 2^16; two lanes cost five more operations and make that 2^32. `kernels.py` has the
same arithmetic for CUDA; here is what it means.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

MASK = 0xFFFFFFFF
# Odd constants with well-mixed bits (from xxHash and lowbias32); C_HIGH folds in bits above 2^32.
C_INDEX, C_MIX, C_LANE, C_HIGH = 0x9E3779B1, 0x7FEB352D, 0x846CA68B, 0x85EBCA77
CHUNK = 1 << 20  # elements at a time: bounds temporary memory to some tens of MB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class Sum(NamedTuple):
    """Two lanes of 32 bits; a group under addition modulo 2^32."""

    a: int
    b: int

    def __add__(self, other: object) -> Sum:
        if not isinstance(other, Sum):
            return NotImplemented
        return Sum((self.a + other.a) & MASK, (self.b + other.b) & MASK)

    def __sub__(self, other: Sum) -> Sum:
        return Sum((self.a - other.a) & MASK, (self.b - other.b) & MASK)


ZERO = Sum(0, 0)


class Place(Protocol):
    """Flat checkpoint indices `offset + Σ i_d · stride_d`, as a plan's Region has them."""

    @property
    def offset(self) -> int: ...
    @property
    def size(self) -> tuple[int, ...]: ...
    @property
    def stride(self) -> tuple[int, ...]: ...


def seed(name: str) -> int:
    """32 bits of the tensor's name: equal contents under exchanged names do not cancel."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


def mix(seed: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The odd factors of the two lanes, as int64 in [0, 2^32), for int64 flat indices."""
    x = _mul(index & MASK, C_INDEX) + _mul(index >> 32, C_HIGH) + seed & MASK
    x = _mul(x ^ (x >> 16), C_MIX)
    x = x ^ (x >> 15)
    y = _mul(x, C_LANE)
    return x | 1, (y ^ (y >> 16)) | 1


def checksum(name: str, tensor: torch.Tensor) -> Sum:
    """H of a whole checkpoint tensor, of any dtype, shape and stride. Blocking."""
    strides, step = [], 1
    for n in reversed(tensor.shape):
        strides.append(step)
        step *= n
    return _strided(seed(name), tensor, 0, tuple(reversed(strides)))


def checksum_region(name: str, part: torch.Tensor, place: Place) -> Sum:
    """The share of H that `part` has: a view (any strides) of the elements that `place` names.

    Summed over disjoint places that fill the tensor it is `checksum` of the whole.
    """
    if tuple(part.shape) != tuple(place.size):
        raise ValueError(f"{tuple(part.shape)} elements at places of {tuple(place.size)}")
    return _strided(seed(name), part, place.offset, place.stride)


def checksum_values(name: str, indices: torch.Tensor, values: torch.Tensor) -> Sum:
    """The share of H of `values` (1-d) that stand at flat `indices`, in any order."""
    total, key = ZERO, seed(name)
    for i in range(0, indices.numel(), CHUNK):
        total += _sum(key, values[i : i + CHUNK], indices[i : i + CHUNK].long())
    return total


def checksum_change(name: str, indices: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> Sum:
    """What replacing `old` by `new` (1-d, one dtype) at flat `indices` adds to H."""
    return checksum_values(name, indices, new) - checksum_values(name, indices, old)


def words(t: torch.Tensor) -> torch.Tensor:
    """The bits of each element as int64 words in [0, 2^32), of shape [..., 1 or 2].

    8-byte elements are two words, the low half first.
    """
    size = t.element_size()
    raw = t.contiguous().view(_BITS[size])
    parts = raw.view(*t.shape, 2) if size == 8 else raw.unsqueeze(-1)
    return parts.long() & ((1 << min(8 * size, 32)) - 1)


def _mul(a: torch.Tensor, b: torch.Tensor | int) -> torch.Tensor:
    """a · b mod 2^32 of int64 words, without a product beyond 2^63."""
    return (a * (b & 0xFFFF) + ((a * (b >> 16) & 0xFFFF) << 16)) & MASK


def _strided(key: int, part: torch.Tensor, offset: int, stride: tuple[int, ...]) -> Sum:
    total = ZERO
    for piece, start in _chunks(part, offset, stride):
        index = torch.full((1,) * max(piece.dim(), 1), start, device=part.device)
        for d, n in enumerate(piece.shape):
            steps = torch.arange(n, device=part.device) * stride[part.dim() - piece.dim() + d]
            index = index + steps.view([-1 if e == d else 1 for e in range(piece.dim())])
        total += _sum(key, piece.reshape(-1), index.expand(piece.shape or (1,)).reshape(-1))
    return total


def _chunks(
    part: torch.Tensor, offset: int, stride: tuple[int, ...]
) -> Iterator[tuple[torch.Tensor, int]]:
    """`part` in pieces of at most CHUNK elements, with the flat index of each one's first."""
    if not part.numel():
        return
    if part.numel() <= CHUNK:
        yield part, offset
        return
    own, inner = stride[-part.dim()], math.prod(part.shape[1:])
    rows = max(1, CHUNK // inner)
    for r in range(0, part.shape[0], rows):
        rest = part[r : r + rows]
        at = offset + r * own
        if rest.numel() <= CHUNK:
            yield rest, at
        else:
            yield from _chunks(rest[0], at, stride)


def _sum(key: int, values: torch.Tensor, index: torch.Tensor) -> Sum:
    bits = words(values)
    lanes = [torch.zeros((), dtype=torch.int64, device=values.device) for _ in range(2)]
    for word in range(bits.shape[-1]):  # an 8-byte element takes two indices
        factors = mix(key, index * bits.shape[-1] + word)
        lanes = [x + _mul(f, bits[..., word]).sum() for x, f in zip(lanes, factors, strict=True)]
    a, b = torch.stack(lanes).tolist()
    return Sum(a & MASK, b & MASK)
