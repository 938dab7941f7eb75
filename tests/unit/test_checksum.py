"""The checksum adds up over shards and patches, and no flipped bit is lost in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.worker.plan.segment import Region

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8,
    torch.int32, torch.bool, torch.int64, torch.float64,
]  # fmt: skip
SHAPES = [(), (1,), (17,), (4, 6), (3, 5, 7), (0, 4), (2, 1, 3, 2)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Random bits, NaNs of every payload and −0.0 among them."""
    g = torch.Generator().manual_seed(seed)
    n = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    most = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, most, (n,), generator=g, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def by_hand(name: str, tensor: torch.Tensor) -> int:
    """The formula in Python's whole numbers."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    total = 0
    for i in range(-(-len(raw) // 4)):
        word = int.from_bytes(bytes(raw[i * 4 : i * 4 + 4]), "little")
        x = ((i & cs.MASK) * cs.C_INDEX + (i >> 32) * cs.C_HIGH + cs.seed(name)) & cs.MASK
        x = ((x ^ (x >> 16)) * cs.C_MIX) & cs.MASK
        total += word * (x ^ (x >> 15) | 1)
    return cs.wrap(total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_formula(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    t = random(shape, dtype, 1)
    assert cs.checksum("w", t) == by_hand("w", t)


def test_strides_do_not_matter() -> None:
    t = random((6, 8), torch.bfloat16, 2)
    assert cs.checksum("w", t.t().contiguous().t()) == cs.checksum("w", t)
    assert cs.checksum("w", t) != cs.checksum("v", t)
    assert cs.checksum("w", t) != cs.checksum("w", t.t().contiguous())


@pytest.mark.parametrize("shape", [(40, 30), (3, 1000), (5000,), (2, 7, 11, 13)])
def test_chunks_do_not_matter(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    t = random(shape, torch.float32, 3)
    whole = cs.checksum("w", t)
    for chunk in (1, 7, 64, 999):
        monkeypatch.setattr(cs, "CHUNK", chunk)
        assert cs.checksum("w", t) == whole


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_shards_add_up(data: st.DataObject) -> None:
    """Row, column and strided shards, transposed in memory: the sum is the whole's."""
    dtype = data.draw(st.sampled_from(DTYPES))
    rows, cols = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    parts = data.draw(st.integers(1, 4))
    how = data.draw(st.sampled_from(["rows", "cols", "interleaved"]))
    t = random((rows, cols), dtype, data.draw(st.integers(0, 99)))
    index = torch.arange(rows * cols).view(rows, cols)
    total = 0
    for p in range(parts):
        if how == "interleaved":
            piece, at = t[p::parts], index[p::parts]
        else:
            dim = 0 if how == "rows" else 1
            piece, at = t.tensor_split(parts, dim)[p], index.tensor_split(parts, dim)[p]
        if not piece.numel():
            continue
        live = piece.t().contiguous().t()
        total += cs.checksum_region("w", live, Region(int(at[0, 0]), at.shape, at.stride()))
    assert cs.wrap(total) == cs.checksum("w", t)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_patch_moves_it_by_its_change(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    n = data.draw(st.integers(1, 60))
    old = random((n,), dtype, 5)
    picked = torch.tensor(
        data.draw(st.lists(st.integers(0, n - 1), unique=True)), dtype=torch.int32
    )
    new = old.clone()
    values = random((len(picked),), dtype, 6)
    new[picked.long()] = values
    change = cs.checksum_change("w", picked, old[picked.long()], values)
    assert cs.wrap(cs.checksum("w", old) + change) == cs.checksum("w", new)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.bool])
def test_every_flipped_bit_shows(dtype: torch.dtype) -> None:
    t = random((23,), dtype, 7)
    whole = cs.checksum("w", t)
    for i in range(t.numel() * dtype.itemsize):
        for bit in range(8):
            changed = t.clone()
            changed.view(torch.uint8)[i] ^= 1 << bit
            assert cs.checksum("w", changed) != whole


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_signs_show(dtype: torch.dtype) -> None:
    """What a sum modulo 2^32 is too weak for: one highest bit moved, or two flipped."""
    n = 600
    t = torch.zeros(n, dtype=dtype)
    t[0] = torch.iinfo(dtype).min
    sums = {cs.checksum("w", t.roll(i)) for i in range(n)}
    assert len(sums) == n
    assert all(cs.wrap(a + b) for a in sums for b in sums if a < b)


def test_indices_beyond_32_bits_are_told_apart() -> None:
    one = torch.ones(1, dtype=torch.int32)
    sums = {cs.checksum_values("w", torch.tensor([5 + (k << 31)]), one) for k in range(64)}
    assert len(sums) == 64


def test_a_part_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="elements at places"):
        cs.checksum_region("w", torch.zeros(3), Region(0, (4,), (1,)))
