"""Checksums that survive sharding: a sum over elements, so ranks add up and patches move it.

    H(T) = Σ word(T, w) · mix(name, w)  mod 2^64

over the 4-byte words of the contiguous checkpoint tensor. An element smaller than a word adds its
bits at its place in the word, one of 8 bytes is two words. `w` counts in the checkpoint tensor,
whoever holds the element, so shards of any form add up to the whole, and a patch moves H by
Σ (new − old) · mix. Word and factor have 32 bits each: the product of a change and a factor, which
is odd, is never 0, so a single changed word always shows, whatever bits of it; two changes cancel
once in about 2^31. (Modulo 2^32 two flipped sign bits would cancel always.) It costs a GPU about
nine operations a word, less time than reading it. `kernels.py` and `cuda_sums.py` have the same
arithmetic for CUDA; here is what it means.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

MASK = 0xFFFFFFFF
# Odd constants with well-mixed bits (from xxHash and lowbias32); C_HIGH folds in bits above 2^32.
C_INDEX, C_MIX, C_HIGH = 0x9E3779B1, 0x7FEB352D, 0x85EBCA77
CHUNK = 1 << 20  # elements at a time: bounds temporary memory to some tens of MB
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def wrap(total: int) -> int:
    """A sum modulo 2^64 as a checksum is written: a signed 64-bit number."""
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


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


def mix(seed: int, word: torch.Tensor) -> torch.Tensor:
    """The odd factors of the words at these int64 places, as int64 in [0, 2^32)."""
    x = (word & MASK) * C_INDEX + seed
    if word.numel() and int(word.max()) > MASK:
        x += (word >> 32) * C_HIGH
    x &= MASK
    x = (x ^ (x >> 16)) * C_MIX & MASK
    return x ^ (x >> 15) | 1


def checksum(name: str, tensor: torch.Tensor) -> int:
    """H of a whole checkpoint tensor, of any dtype, shape and stride. Blocking."""
    strides, step = [], 1
    for n in reversed(tensor.shape):
        strides.append(step)
        step *= n
    return _strided(seed(name), tensor, 0, tuple(reversed(strides)))


def checksum_run(name: str, part: torch.Tensor, start: int = 0) -> int:
    """The share of H of consecutive elements from flat index `start`. Blocking."""
    return checksum_runs([(name, part, start)])[0]


def checksum_runs(runs: Sequence[tuple[str, torch.Tensor, int]]) -> list[int]:
    """The same of many (name, elements, start). Blocking."""
    return begin_runs(runs)()


def begin_runs(runs: Sequence[tuple[str, torch.Tensor, int]]) -> Callable[[], list[int]]:
    """The same, on CUDA by one kernel that the current stream takes behind what it was given: the
    elements may change after that, and are not kept. The result waits for it."""
    out = [0 if t.is_cuda else _strided(seed(n), t.detach().reshape(-1), start, (1,))
           for n, t, start in runs]  # fmt: skip
    on_gpu = [i for i, (_, t, _) in enumerate(runs) if t.is_cuda and t.numel()]
    if not on_gpu:
        return lambda: out
    from vllm_wt_plugin.sparse.cuda_sums import CudaSums
    from vllm_wt_plugin.sparse.patch import WORDS
    from vllm_wt_plugin.sparse.scatter import Row

    def part(name: str, t: torch.Tensor, start: int) -> tuple[int, Row]:
        flat = t.detach().contiguous().view(-1).view(WORDS[t.element_size()])
        return seed(name), Row(flat, start, ((len(flat), 1, 1),))

    parts = [part(*runs[i]) for i in on_gpu]  # some are copies: they live until the launch
    begun = CudaSums(parts).begin()

    def result() -> list[int]:
        for i, s in zip(on_gpu, begun(), strict=True):
            out[i] = s
        return out

    return result


def checksum_region(name: str, part: torch.Tensor, place: Place) -> int:
    """The share of H that `part` has: a view (any strides) of the elements that `place` names.

    Summed over disjoint places that fill the tensor it is `checksum` of the whole.
    """
    if tuple(part.shape) != tuple(place.size):
        raise ValueError(f"{tuple(part.shape)} elements at places of {tuple(place.size)}")
    return _strided(seed(name), part, place.offset, place.stride)


def checksum_values(name: str, indices: torch.Tensor, values: torch.Tensor) -> int:
    """The share of H of `values` (1-d) that stand at flat `indices`, in any order."""
    total, key = 0, seed(name)
    for i in range(0, indices.numel(), CHUNK):
        total += _sum(key, values[i : i + CHUNK], indices[i : i + CHUNK].long())
    return wrap(total)


def checksum_change(name: str, indices: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> int:
    """What replacing `old` by `new` (1-d, one dtype) at flat `indices` adds to H."""
    total, key = 0, seed(name)
    for i in range(0, indices.numel(), CHUNK):
        part = slice(i, i + CHUNK)
        total += _sum(key, new[part], indices[part].long(), old[part])
    return wrap(total)


def words(t: torch.Tensor) -> torch.Tensor:
    """The bits of each element as int64 words in [0, 2^32), of shape [..., 1 or 2].

    8-byte elements are two words, the low half first.
    """
    size = t.element_size()
    raw = t.contiguous().view(_BITS[size])
    parts = raw.view(*t.shape, 2) if size == 8 else raw.unsqueeze(-1)
    return parts.long() & ((1 << min(8 * size, 32)) - 1)


def _strided(key: int, part: torch.Tensor, offset: int, stride: tuple[int, ...]) -> int:
    total = 0
    for piece, start in _chunks(part, offset, stride):
        index = torch.full((1,) * max(piece.dim(), 1), start, device=part.device)
        for d, n in enumerate(piece.shape):
            steps = torch.arange(n, device=part.device) * stride[part.dim() - piece.dim() + d]
            index = index + steps.view([-1 if e == d else 1 for e in range(piece.dim())])
        total += _sum(key, piece.reshape(-1), index.expand(piece.shape or (1,)).reshape(-1))
    return wrap(total)


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


def _sum(
    key: int, values: torch.Tensor, index: torch.Tensor, minus: torch.Tensor | None = None
) -> int:
    bits, size = words(values), values.element_size()
    if minus is not None:
        bits -= words(minus)
    many, per = bits.shape[-1], max(1, 4 // size)  # words in an element, elements in a word
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for k in range(many):
        at = index * many + k
        shifted = bits[..., k] << (at % per * 8 * size)
        total += (shifted * mix(key, at // per)).sum()
    return int(total)
