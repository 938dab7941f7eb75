"""Boxes of memory as one view: against torch's own strides."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from vllm_wt_plugin.wire.handles import contiguous_stride
from vllm_wt_plugin.wire.views import Box, NoView, view_of


def box(part: torch.Tensor, live: torch.Tensor) -> Box:
    """`part` is a view of a contiguous tensor, `live` where the same elements are in memory."""
    return Box(
        tuple(part.shape), int(part.storage_offset()), part.stride(),
        int(live.storage_offset()), live.stride(),
    )  # fmt: skip


def found(whole: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    offset, stride = view_of(tuple(whole.shape), [box(p, m) for p, m in pairs])
    return pairs[0][1].as_strided(whole.shape, stride, offset)


def test_a_part_of_a_fused_tensor() -> None:
    qkv, k = torch.arange(80.0).view(10, 8), torch.empty(3, 8)
    assert torch.equal(found(k, [(k, qkv[4:7])]), qkv[4:7])


def test_a_transposed_tensor() -> None:
    live, hf = torch.arange(12.0).view(3, 4), torch.empty(4, 3)
    view = found(hf, [(hf, live.t())])
    assert torch.equal(view, live.t())
    assert view.stride() == (1, 4)


def test_fused_experts_from_one_box_per_expert_and_projection() -> None:
    experts, inner, hidden = 4, 3, 5
    live = torch.arange(float(experts * 2 * inner * hidden)).view(experts, 2 * inner, hidden)
    hf = torch.empty(experts, 2 * inner, hidden)
    pairs = [
        (hf[e, half * inner : (half + 1) * inner], live[e, half * inner : (half + 1) * inner])
        for e, half in itertools.product(range(experts), range(2))
    ]
    assert torch.equal(found(hf, pairs[::-1]), live)
    swapped = [
        (p, live[e, (1 - half) * inner : (2 - half) * inner])
        for (p, _), (e, half) in zip(
            pairs, itertools.product(range(experts), range(2)), strict=True
        )
    ]
    with pytest.raises(NoView, match="equal distances"):
        found(hf, swapped)


def test_rows_at_equal_distances() -> None:
    live, hf = torch.arange(100.0), torch.empty(3, 2)
    pairs = [(hf[i], live[10 + 20 * i : 12 + 20 * i]) for i in range(3)]
    assert found(hf, pairs).tolist() == [[10, 11], [30, 31], [50, 51]]
    pairs[2] = (hf[2], live[51:53])
    with pytest.raises(NoView, match="equal distances"):
        found(hf, pairs)


def test_single_elements() -> None:
    live, hf = torch.arange(10.0), torch.empty(1, 1, 1)
    assert found(hf, [(hf, live[7:8].view(1, 1, 1))]).item() == 7
    assert view_of((), [Box((), 0, (), 5, ())]) == (5, ())


def test_flat_copies_are_cut_into_the_tensors_dimensions() -> None:
    live, hf = torch.arange(50.0), torch.empty(2, 3, 4)
    assert torch.equal(found(hf, [(hf.view(-1), live[10:34])]), live[10:34].view(2, 3, 4))
    strided = torch.arange(48.0)[::2]
    assert torch.equal(found(hf, [(hf.view(6, 4), strided.view(6, 4))]), strided.view(2, 3, 4))


def test_interleaved_rows() -> None:
    live, hf = torch.arange(24.0).view(6, 4), torch.empty(6, 4)
    assert torch.equal(found(hf, [(hf[::2], live[::2]), (hf[1::2], live[1::2])]), live)
    with pytest.raises(NoView, match="equal distances"):
        found(hf, [(hf[::2], live[:3]), (hf[1::2], live[3:])])


def test_what_is_missing_or_double() -> None:
    live, hf = torch.arange(24.0).view(6, 4), torch.empty(6, 4)
    with pytest.raises(NoView, match="8 of its 24 elements"):
        found(hf, [(hf[:4], live[:4])])
    with pytest.raises(NoView, match="several places"):  # rows 2 and 3 twice, 4 and 5 not at all
        found(hf, [(hf[:4], live[:4]), (hf[2:4], live[4:])])
    with pytest.raises(NoView, match="several places"):
        view_of((4,), [Box((2, 4), 0, (0, 1), 0, (4, 1))])
    with pytest.raises(NoView, match="elements are not"):
        view_of((4,), [])


def cuts(n: int, at: int) -> list[slice]:
    return [slice(0, n)] if at in (0, n) else [slice(0, at), slice(at, n)]


@pytest.mark.parametrize("seed", range(60))
def test_any_grid_of_boxes_of_any_view(seed: int) -> None:
    """Permuted, sliced memory, cut into a grid of boxes in any order: always the same view."""
    g = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    rank = pick(1, 4)
    shape = tuple(pick(1, 5) for _ in range(rank))
    order = torch.randperm(rank, generator=g).tolist()
    big = torch.arange(float(torch.Size([2 * n + 1 for n in shape]).numel()))
    memory: Any = big.view([2 * shape[d] + 1 for d in order])
    memory = memory.permute([order.index(d) for d in range(rank)])
    memory = memory[tuple(slice(1, 1 + n) for n in shape)]
    whole = torch.empty(shape)
    grid = itertools.product(*(cuts(n, pick(0, n)) for n in shape))
    pairs = [(whole[at], memory[at]) for at in grid]
    pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=g).tolist()]
    view = found(whole, pairs)
    assert torch.equal(view, memory)
    offset, stride = view_of(shape, [box(p, m) for p, m in pairs])
    expected = zip(shape, stride, memory.stride(), strict=True)
    assert offset == memory.storage_offset()
    assert all(n == 1 or a == b for n, a, b in expected)
    assert contiguous_stride(shape) == whole.stride()
