"""Random tensors, dtypes, shardings and memory layouts: what a patch does is what a copy does.

Every rank holds its shards in memory of its own, rows apart or transposed; a patch comes in any
order. `tests/unit/test_patches.py` does the same through plans, sessions and faults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_checksum import random
from vllm_wt_plugin.sparse.checksum import checksum, checksum_region, wrap
from vllm_wt_plugin.sparse.diff import Comparison, Pair
from vllm_wt_plugin.sparse.patch import WORDS, Group
from vllm_wt_plugin.sparse.scatter import Layers, layers, row, table
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.segment import Region

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int32,
    torch.bool,
]  # fmt: skip


@dataclass(eq=False)
class Shard:
    """Elements `place` of a checkpoint tensor, in live memory `dest` of the same size."""

    place: Region
    memory: torch.Tensor
    dest: torch.Tensor

    def load(self, whole: torch.Tensor) -> None:
        self.dest.copy_(self.place.of_tensor(whole))


@dataclass(eq=False)
class Case:
    old: torch.Tensor
    new: torch.Tensor
    spec: ParamSpec
    ranks: list[list[Shard]]

    def rows(self, rank: int) -> Layers:
        found = [row(s.place, s.dest) for s in self.ranks[rank]]
        known = [r for r in found if r is not None]
        assert len(known) == len(found)
        out = layers(known)
        assert out is not None
        return out


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, name: str) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    old = random(shape, dtype, draw(st.integers(0, 99)))
    other = random(shape, dtype, draw(st.integers(100, 199)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    changed = torch.rand(shape, generator=g) < share
    word = WORDS[dtype.itemsize]
    new = torch.where(changed, other.view(word), old.view(word)).view(dtype)
    dim = draw(st.integers(0, len(shape) - 1))
    count = draw(st.integers(1, 3))
    interleaved = draw(st.booleans())
    index = torch.arange(old.numel()).view(shape)
    ranks: list[list[Shard]] = []
    for r in range(count):
        if interleaved:
            at = index[(slice(None),) * dim + (slice(r, None, count),)]
        else:
            at = index.tensor_split(count, dim)[r]
        held = [_shard(draw, at, dtype)] if at.numel() else []
        ranks.append(held)
    if draw(st.booleans()):  # a replica of rank 0's part, in other memory: counted once
        ranks[0] += [_shard(draw, index.view(-1)[s.place.offset :].as_strided(
            s.place.size, s.place.stride), dtype) for s in ranks[0]]  # fmt: skip
    spec = ParamSpec(name, str(dtype).removeprefix("torch."), shape)
    return Case(old, new, spec, ranks)


def _shard(draw: st.DrawFn, at: torch.Tensor, dtype: torch.dtype) -> Shard:
    """`at`: the flat indices of its elements, as a view of all of them."""
    place = Region(int(at.reshape(-1)[0]), tuple(at.shape), at.stride())
    order = draw(st.permutations(range(at.dim())))
    gap = draw(st.integers(0, 2))  # elements of others at the end of each innermost row
    sizes = [at.shape[d] for d in order]
    memory = random((*sizes[:-1], sizes[-1] + gap), dtype, 7)
    dest = memory[..., : sizes[-1]].permute([order.index(d) for d in range(at.dim())])
    return Shard(place, memory, dest)


def _shuffled(g: Group) -> Group:
    rows = [(i.flip(0), v.flip(0)) for _, i, v in g.rows()]
    indices, values = (torch.cat(x) for x in zip(*rows, strict=True))
    return replace(g, indices=indices, values=values)


def _bits(shards: list[Shard]) -> list[torch.Tensor]:
    return [s.memory.view(torch.uint8).clone() for s in shards]


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_patch_is_a_copy(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    given_ = [data.draw(cases(dtype, f"w{i}")) for i in range(data.draw(st.integers(1, 3)))]
    pairs = [Pair(c.spec, c.new, c.old.clone()) for c in given_]
    comparison = Comparison(pairs)
    found = comparison.begin()(10**9)
    assert found is not None
    sums = {s.name: x for d in found for s, x in zip(d.group.specs, d.sums, strict=True)}
    for c in given_:  # what moves is what the full sums differ by
        before, after = checksum(c.spec.name, c.old), checksum(c.spec.name, c.new)
        assert wrap(before + sums.get(c.spec.name, 0)) == after
    total = dict.fromkeys(sums, 0)
    for rank in range(max(len(c.ranks) for c in given_)):
        mine = [c for c in given_ if rank < len(c.ranks)]
        shards = [s for c in mine for s in c.ranks[rank]]
        for c in mine:
            for s in c.ranks[rank]:
                s.load(c.new)
        dense = _bits(shards)
        for c in mine:
            for s in c.ranks[rank]:
                s.load(c.old)
        before_bits = _bits(shards)
        rows = {c.spec.name: c.rows(rank) if c in mine else [] for c in given_}
        for d in found:
            group = _shuffled(d.group) if data.draw(st.booleans()) else d.group
            numels = {c.spec.name: c.spec.numel for c in given_}
            ways = table(rows, numels, group).scatter(group)
            ways.check()
            assert _same(_bits(shards), before_bits)
            ways.swap()
            assert _same(_bits(shards), dense)
            ways.undo()
            assert _same(_bits(shards), before_bits)
            for spec, x in zip(group.specs, ways.swap(), strict=True):
                total[spec.name] = wrap(total[spec.name] + x)
    assert total == sums  # over all ranks, replicas once
    for c in given_:  # and so do the full sums of what lies there now
        parts = [checksum_region(c.spec.name, own[0].dest, own[0].place) for own in c.ranks if own]
        assert wrap(sum(parts)) == checksum(c.spec.name, c.new)
    comparison.accept([d.group for d in found])
    again = comparison.begin()(0)
    assert again == []
