"""Buckets filled from tensors that last hold the same bytes as those of a walk."""

from __future__ import annotations

import torch

from vllm_wt_plugin.trainer.filling import Filling, Walk
from vllm_wt_plugin.trainer.listing import Lister
from vllm_wt_plugin.wire.buckets import buckets_of, size


def test_a_planned_filling_equals_a_walk() -> None:
    torch.manual_seed(0)
    tensors = {
        "rows": torch.randn(33, 7, dtype=torch.bfloat16, requires_grad=True),
        "transposed": torch.randn(8, 16).t(),
        "scalar": torch.tensor(3.5),
        "fp8": torch.randn(40).to(torch.float8_e4m3fn),
        "flags": torch.rand(100) > 0.5,
        "none": torch.empty(0, 4),
        "long": torch.arange(50),
    }
    listing = Lister().list(tensors)
    buckets = buckets_of(listing.specs, "rows", 512)
    assert len(buckets) > 3
    memory = [[torch.zeros(512, dtype=torch.uint8) for _ in range(2)] for _ in range(2)]
    seen: list[str] = []
    fills = (
        Filling(listing, buckets, memory[0]),
        Walk(listing, buckets, memory[1], lambda name, _: seen.append(name)),
    )
    assert [f.ahead for f in fills] == [True, False]
    for _ in range(2):  # a filling is used again, with new values in the same tensors
        for i, bucket in enumerate(buckets):
            with torch.no_grad():
                for f in fills:
                    f.fill(i)
            mine, want = (m[i % 2][: size(bucket)] for m in memory)
            for p in bucket:
                part = slice(p.offset, p.offset + p.nbytes)
                assert torch.equal(mine[part], want[part])
        with torch.no_grad():
            tensors["rows"] += 1
            tensors["transposed"].mul_(2)
        fills[1].finish()
        fills = (fills[0], Walk(listing, buckets, memory[1], lambda *_: None))
    assert seen == [n for n in tensors if n != "none"]
