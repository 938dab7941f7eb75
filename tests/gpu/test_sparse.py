"""The sparse kernels on a GPU against their references; int64 indices; bits beyond 2^31."""

from __future__ import annotations

import pytest
import torch

from tests.support import sparse_cases as cases
from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse import kernels
from vllm_wt_plugin.sparse.cuda_diff import CudaPart
from vllm_wt_plugin.sparse.diff import Pair
from vllm_wt_plugin.sparse.scatter import row
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.segment import Region

pytestmark = pytest.mark.gpu
BIG = (1, 4095, 4097, 1_000_000, 3_333_333)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_diff(dtype: torch.dtype) -> None:
    cases.check_diff(dtype, "cuda")
    cases.check_diff(dtype, "cuda", BIG)


def test_diff_rounds_as_a_dense_push() -> None:
    for to in (torch.bfloat16, torch.float16):
        cases.check_rounding_diff("cuda", BIG, to)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_scatter_and_undo(dtype: torch.dtype) -> None:
    cases.check_scatter(dtype, "cuda")
    cases.check_scatter(dtype, "cuda", BIG)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_checksums(dtype: torch.dtype) -> None:
    cases.check_sums(dtype, "cuda")


@pytest.mark.parametrize("size", [64, 4096])
def test_checksums_of_views(size: int) -> None:
    """Made contiguous for the sum alone: their memory must last until it is read."""
    tensors = [torch.randn(size, size, device="cuda") for _ in range(20)]
    views = [(f"w{i}", t.t(), 0) for i, t in enumerate(tensors)]
    want = [cs.checksum(n, t.cpu()) for n, t, _ in views]
    for _ in range(20):
        assert cs.checksum_runs(views) == want


def test_beyond_two_to_the_31_elements() -> None:
    n = 2**31 + 12345
    old = torch.zeros(n, dtype=torch.int8, device="cuda")
    new = old.clone()
    at = torch.tensor([0, 5, 2**31 - 1, 2**31, n - 1], device="cuda")
    new[at] = torch.arange(1, 6, dtype=torch.int8, device="cuda")
    found = CudaPart([Pair(ParamSpec("big", "int8", (n,)), new, old)]).begin()(1000)
    assert found is not None
    assert found.group.indices.dtype == torch.int64
    assert found.group.indices.tolist() == at.tolist()
    place = row(Region(0, (n,), (1,)), old)
    assert place is not None
    g = found.group
    places = {"big": [[place]]}
    table = kernels.CudaTable(places, {"big": n}, g.indices.dtype, g.values.dtype, old.device)
    writing = table.scatter(g)
    writing.check()
    assert tuple(writing.swap()) == found.sums
    assert torch.equal(old, new)
    writing.undo()
    assert not old.any()
