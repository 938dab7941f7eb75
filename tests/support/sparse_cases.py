"""What the kernels of `sparse/` must do, on any device: the same as their torch references.

TRITON_INTERPRET=1 python -m tests.support.sparse_cases     (on the CPU, by Triton's interpreter)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.sparse import checksum as cs
from vllm_wt_plugin.sparse import cuda_diff, cuda_sums, kernels
from vllm_wt_plugin.sparse.diff import Diff, Pair, TorchPart
from vllm_wt_plugin.sparse.patch import WORDS, Group
from vllm_wt_plugin.sparse.scatter import Row, TorchTable, layers, row
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.segment import Region

DTYPES = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool]
SIZES = (1, 5, 64, 1000, 4096, 4097, 20_000)


def random(n: int, dtype: torch.dtype, seed: int, device: str) -> torch.Tensor:
    """Random bits: NaNs of every payload and −0.0 among them."""
    g = torch.Generator().manual_seed(seed)
    most = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, most, (n * dtype.itemsize,), generator=g, dtype=torch.uint8)
    return raw.view(dtype).to(device)


def pairs(
    dtype: torch.dtype, device: str, share: float, sizes: Sequence[int] = SIZES
) -> list[Pair]:
    out = []
    for i, n in enumerate(sizes):
        old, other = random(n, dtype, i, device), random(n, dtype, i + 100, device)
        g = torch.Generator().manual_seed(i)
        changed = (torch.rand(n, generator=g) < share).to(device)
        word = WORDS[dtype.itemsize]
        new = torch.where(changed, other.view(word), old.view(word)).view(dtype)
        out.append(Pair(ParamSpec(f"w{i}", str(dtype).removeprefix("torch."), (n,)), new, old))
    return out


def same(a: Diff | None, b: Diff | None) -> None:
    assert a is not None
    assert b is not None
    assert a.group.specs == b.group.specs
    assert a.group.counts == b.group.counts
    assert torch.equal(a.group.indices, b.group.indices)
    assert torch.equal(a.group.values, b.group.values)
    assert a.sums == b.sums


def check_diff(dtype: torch.dtype, device: str, sizes: Sequence[int] = SIZES) -> None:
    for share in (0.0, 0.01, 0.3, 1.0):
        rows = pairs(dtype, device, share, sizes)
        want = TorchPart(rows).begin()(10**9)
        ours = cuda_diff.CudaPart(rows)
        same(ours.begin()(10**9), want)
        assert want is not None
        count = want.group.indices.numel()
        same(ours.begin()(count), want)
        if count:
            assert ours.begin()(count - 1) is None
        check_without_memory(ours)
        same(ours.begin()(10**9), want)  # the next one has enough room at once
        begun, news = ours.begin(), [p.new.clone() for p in rows]
        for p in rows:
            p.new.zero_()  # after it was compared
        same(begun(10**9), want)
        for p, new in zip(rows, news, strict=True):
            p.new.copy_(new)
        ours.accept(want.group)
        assert equal([p.old for p in rows], [p.new for p in rows])


def check_without_memory(part: cuda_diff.CudaPart) -> None:
    """Then everything is sent instead."""

    def full(*_: object) -> torch.Tensor:
        raise torch.cuda.OutOfMemoryError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(part, "_empty", full)
        assert part.begin()(10**9) is None


def check_rounding_diff(
    device: str, sizes: Sequence[int] = SIZES, to: torch.dtype = torch.bfloat16
) -> None:
    """A float32 trainer of a 16-bit engine: compared as a dense push would round."""
    rows = []
    for i, n in enumerate(sizes):
        new = torch.randn(n, generator=torch.Generator().manual_seed(i)).to(device)
        old = new.to(to)
        old[:: max(n // 3, 1)] += 1
        rows.append(Pair(ParamSpec(f"w{i}", str(to)[6:], (n,)), new, old))
    rows.append(Pair(ParamSpec("same", str(to)[6:], (7,)), old[:7].clone(), old[:7].clone()))
    same(cuda_diff.CudaPart(rows).begin()(10**9), TorchPart(rows).begin()(10**9))


def check_scatter(dtype: torch.dtype, device: str, sizes: Sequence[int] = SIZES) -> None:
    """Whole, rows, columns transposed, in two segments, mirrored, not here at all."""
    found = TorchPart(pairs(dtype, device, 0.3, sizes)).begin()(10**9)
    assert found is not None
    for wide, few in ((False, False), (True, False), (False, True)):
        g = found.group
        if wide:
            g = Group(g.specs, g.counts, g.indices.long(), g.values)
        lives: list[torch.Tensor] = []
        rows = {
            s.name: places(s.numel, kind, dtype, device, lives)
            for s, kind in zip(g.specs, itertools.cycle(range(5)))
        }
        numels = {s.name: s.numel for s in g.specs}
        before = [x.clone() for x in lives]
        way = kernels.CudaTable(rows, numels, g.indices.dtype, g.values.dtype, g.values.device)
        if few:  # which share the work, as where little has changed
            way.processors, way.apart = 2, 1.0
        reference, ours = TorchTable(rows).scatter(g), way.scatter(g)
        mixed = way.scatter(shuffled(g))
        for ways in (reference, ours, mixed):
            ways.check()
            ways.undo()  # of nothing
        for wrong in refused(g) if dtype == DTYPES[0] else ():
            with pytest.raises(RequestError, match=r"given twice|elements"):
                way.scatter(wrong).check()
        assert equal(lives, before)
        sums = reference.swap()
        after = [x.clone() for x in lives]
        assert not equal(after, before)
        reference.undo()
        assert equal(lives, before)
        for ways in (ours, mixed, ours):
            assert ways.swap() == sums
            assert equal(lives, after)
            ways.undo()
            assert equal(lives, before)


def shuffled(g: Group) -> Group:
    """The same patches, each in another order."""
    rows = [(i.flip(0), v.flip(0)) for _, i, v in g.rows()]
    indices, values = (torch.cat(x) for x in zip(*rows, strict=True))
    return replace(g, indices=indices, values=values)


def refused(g: Group) -> Iterator[Group]:
    """An index below, one beyond its tensor (the last's and the first's), one given twice."""
    first = g.counts[0]
    for at, index in ((0, -1), (-1, g.specs[-1].numel), (first - 1, g.specs[0].numel), (-1, -2)):
        wrong = g.indices.clone()
        wrong[at] = wrong[at - 1] if index == -2 else index
        yield replace(g, indices=wrong)


def places(
    n: int, kind: int, dtype: torch.dtype, device: str, lives: list[torch.Tensor]
) -> list[list[Row]]:
    def live(count: int) -> torch.Tensor:
        lives.append(random(count + 3, dtype, len(lives) + 500, device))
        return lives[-1][3:]

    def known(place: Region, dest: torch.Tensor) -> Row:
        found = row(place, dest)
        assert found is not None
        return found

    cols = 10 if n % 10 == 0 else 1
    lines = n // cols
    if kind == 0:
        return [[known(Region(0, (n,), (1,)), live(n))]]
    if kind == 1:  # a half of the rows
        half = lines // 2
        size = (lines - half, cols)
        return [
            [known(Region(half * cols, size, (cols, 1)), live((lines - half) * cols).view(size))]
        ]
    if kind == 2:  # some columns, transposed in memory
        part = max(1, cols - 3)
        dest = live(lines * part).view(part, lines).t()
        return [[known(Region(cols - part, (lines, part), (cols, 1)), dest)]]
    whole = known(Region(0, (lines, cols), (cols, 1)), live(n).view(lines, cols))
    if kind == 3:
        mirror = known(Region(0, (n,), (1,)), live(n))
        found = layers([whole, mirror])
        assert found is not None
        assert len(found) == 2
        return found
    return []


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def check_sums(dtype: torch.dtype, device: str, sizes: Sequence[int] = SIZES) -> None:
    """Whole tensors and shards of them, against the reference on the CPU."""
    parts = []
    want = []
    for i, n in enumerate(sizes):
        t = random(n, dtype, i, device)
        for place, dest in (
            (Region(0, (n,), (1,)), t),
            (Region(3, (n // 2, 1), (2, 1)), t[: n // 2].view(-1, 1)),
            (Region(1, (n // 5, 2), (7, 3)), t[: n // 5 * 2].view(2, -1).t()),
        ):
            if not dest.numel():
                continue
            found = row(place, dest)
            assert found is not None
            parts.append((cs.seed(f"w{i}"), found))
            want.append(cs.checksum_region(f"w{i}", dest.cpu(), place))
    sums = cuda_sums.CudaSums(parts)
    begun = sums.begin()
    assert sums.begin()() == want
    for _, r in parts:
        r.dest.zero_()  # it was read before, on the same stream
    assert begun() == want
    assert sums.begin()() == [0] * len(parts)


def main() -> None:
    # The interpreter takes a tile as one step.
    cuda_sums.TILE = kernels.PATCH = cuda_diff.TILE = 256
    cuda_diff.TAKEN, cuda_diff.MOVED = 64, 16
    small = (1, 64, 300, 257)
    for dtype in {d.itemsize: d for d in DTYPES}.values():  # the kernels see words of its size
        check_diff(dtype, "cpu", small)
        check_scatter(dtype, "cpu", small)
        check_sums(dtype, "cpu", small)
    check_rounding_diff("cpu", small, torch.float16)  # the interpreter cuts bf16 off
    print("all kernels agree with their references")


if __name__ == "__main__":
    main()
