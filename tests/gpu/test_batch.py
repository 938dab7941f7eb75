"""The batched copy's kernels against their reference, one `copy_` per pair."""

from __future__ import annotations

import pytest
import torch

from vllm_wt_plugin.worker.plan.batch import Batch

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.int64]


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    g = torch.Generator(device="cuda").manual_seed(seed)
    n = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (max(n, 1),), generator=g, device="cuda", dtype=torch.uint8)
    return raw[:n].view(dtype).view(shape)


def _pairs(dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Flat, row-strided both ways, unaligned, transposed, tiny, empty, 0-d, larger than a tile."""
    out = []
    for i, (rows, cols) in enumerate([(1, 1), (3, 5), (64, 4096), (1000, 777), (7, 100_003)]):
        whole = torch.zeros(rows * 3, cols + 13, dtype=torch.uint8, device="cuda")
        whole = torch.zeros(rows * 3 * (cols + 13), dtype=dtype, device="cuda")
        grid = whole.view(rows * 3, cols + 13)
        src = _random((rows, cols), dtype, i)
        out += [
            (torch.zeros_like(src), src),
            (grid[:rows, :cols], src),
            (grid[rows : 2 * rows, 1 : cols + 1], src),
            (grid[2 * rows :, :cols], _random((rows, cols + 1), dtype, i + 50)[:, 1:]),
            (torch.zeros(cols, rows, dtype=dtype, device="cuda"), src.t()),
        ]
    empty = torch.empty(0, 4, dtype=dtype, device="cuda")
    return [*out, (empty, empty.clone()), (torch.zeros((), dtype=dtype, device="cuda"),) * 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_copy(dtype: torch.dtype) -> None:
    pairs = _pairs(dtype)
    Batch(pairs).run()
    for dst, src in pairs:
        a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (dst, src))
        assert torch.equal(a, b), (dst.shape, dst.stride(), src.stride())


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_casts_as_copy_does(to: torch.dtype) -> None:
    src = torch.randn(513, 2049, device="cuda") * 10
    src[0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    dst = torch.zeros(513, 3000, dtype=to, device="cuda")
    Batch([(dst[:, 7:2056], src), (want := torch.zeros_like(src, dtype=to), src)]).run()
    reference = torch.empty_like(want).copy_(src)
    for got in (dst[:, 7:2056].contiguous(), want):
        assert torch.equal(got.view(torch.int16), reference.view(torch.int16))
    assert not dst[:, :7].any()
    assert not dst[:, 2056:].any()


def test_beyond_two_to_the_31_elements() -> None:
    n = 2**31 + 12345
    src = torch.arange(n, device="cuda", dtype=torch.int32).to(torch.int8)
    dst = torch.zeros_like(src)
    Batch([(dst, src)]).run()
    assert torch.equal(dst, src)


def test_copies_into_tensors_that_are_made_anew() -> None:
    """As many as an MoE's, in three places by turns."""
    sources = [_random((64, 96), torch.bfloat16, i) for i in range(80)]
    want = torch.stack(sources)

    def fill(into: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(into, sources, strict=True))

    into = torch.zeros_like(want)
    (batch := Batch(fill(into))).run()
    moving = batch.moving([into.data_ptr()])
    assert moving is not None
    held = [into]
    for _ in range(3):
        held.append(torch.zeros_like(want))
        assert moving.run([held[-1].data_ptr()])
    assert moving.run([held[1].zero_().data_ptr()])
    assert all(torch.equal(x.view(torch.int16), want.view(torch.int16)) for x in held)
