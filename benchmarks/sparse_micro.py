"""Each kernel of sparse pushes alone, over tiles and warps, on a Qwen3-8B's tensors.

    python -m benchmarks.sparse_micro [--share 0.01] [--quick]

Prints GPU milliseconds (events, median) with the bytes a kernel must move, and milliseconds of
the host for the calls that launch them. `_find`, `_take`, `_put` and `_swap` move 32-byte
sectors for elements that lie apart; their bytes are counted so.
"""

from __future__ import annotations

import argparse
import itertools
import statistics as st
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.copy_sweep import tensors
from vllm_wt_plugin.sparse import cuda_diff, kernels
from vllm_wt_plugin.sparse.checksum import seed
from vllm_wt_plugin.sparse.diff import Pair
from vllm_wt_plugin.sparse.scatter import Row
from vllm_wt_plugin.wire.params import ParamSpec


def gpu_ms(f: Callable[[], object], rounds: int = 7) -> float:
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # the launches queue up: no host time between the events
        start.record()
        f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return st.median(times[2:])


def host_ms(f: Callable[[], object], rounds: int = 7) -> tuple[float, float]:
    """Until the call returns, and until the GPU is done."""
    returned, done = [], []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        returned.append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()
        done.append((time.perf_counter() - start) * 1e3)
    return st.median(returned[1:]), st.median(done[1:])


def show(name: str, ms: float, nbytes: float) -> None:
    print(f"{name}: {ms:.3f} ms, {nbytes / ms / 1e6:.0f} GB/s of {nbytes / 1e9:.2f} GB", flush=True)


def sweep(quick: bool, tiles: tuple[int, ...], warps: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    yield from [(tiles[0], warps[0])] if quick else itertools.product(tiles, warps)


class Bench:
    def __init__(self, share: float, quick: bool) -> None:
        self.quick, self.share = quick, share
        news = tensors(fused=False)
        olds = [t.clone() for t in news]
        for t in news:
            flat = t.view(torch.int16).view(-1)
            n = max(1, int(flat.numel() * share))
            flat[torch.randint(0, flat.numel(), (n,), device="cuda").unique()] ^= 1
        self.pairs = [
            Pair(ParamSpec(f"w{i}", "bfloat16", tuple(n.shape)), n, o)
            for i, (n, o) in enumerate(zip(news, olds, strict=True))
        ]
        self.nbytes = sum(t.nbytes for t in news)

    def diff(self) -> None:
        """Reads both copies; writes and reads a bit per element; then only what has changed."""
        elements = self.nbytes / 2
        for tile, warps in sweep(self.quick, (8192, 4096, 16384), (8, 4, 16)):
            cuda_diff.TILE, cuda_diff.WARPS["mark"] = tile, warps
            part: Any = cuda_diff.CudaPart(self.pairs)
            masks = torch.empty(part._grid, tile // 32, dtype=torch.int32, device="cuda")
            counts = torch.empty(part._grid, dtype=torch.int32, device="cuda")
            label = f"mark, tile {tile}, {warps} warps"
            mark = gpu_ms(lambda p=part, m=masks, c=counts: p._mark(p._launches, m, c))
            show(label, mark, 2 * self.nbytes + elements / 8)
            scan = gpu_ms(lambda c=counts: c.cumsum(0, dtype=torch.int64))
            show(f"prefix sum, tile {tile}", scan, part._grid * 12)
            ends = counts.cumsum(0, dtype=torch.int64)
            total = int(ends[-1])
            indices = torch.empty(total, dtype=torch.int32, device="cuda")
            for find in (4,) if self.quick else (1, 2, 4, 8):
                cuda_diff.WARPS["find"] = find
                ms = gpu_ms(lambda p=part, m=masks, c=counts, e=ends, i=indices:
                            p._find(m, c, e, i))  # fmt: skip
                show(f"find, tile {tile}, {find} warps", ms, elements / 8 + 4 * total)
        cuda_diff.TILE, cuda_diff.WARPS["mark"], cuda_diff.WARPS["find"] = 8192, 8, 4

    def changed(self) -> Any:
        part: Any = cuda_diff.CudaPart(self.pairs)
        found = part.find(10**10)
        group = found.group
        n = group.indices.numel()
        apart = 32 * min(1.0, 1 / (16 * self.share))  # bytes per element read at its place
        starts = torch.tensor(group.starts, device="cuda")
        sums = torch.zeros(len(group.specs), dtype=torch.int64, device="cuda")
        for tile, warps in sweep(self.quick, (1024, 512, 2048, 4096), (4, 2, 8)):
            cuda_diff.CHANGES, cuda_diff.WARPS["take"] = tile, warps
            label = f"tile {tile}, {warps} warps"
            take = gpu_ms(lambda: part._take(part._launches, list(group.counts), starts,
                                             group.indices, group.values, sums))  # fmt: skip
            show(f"take (with its tiles), {label}", take, n * (6 + 2 * apart))
            show(f"put (with its tiles), {label}", gpu_ms(lambda: part.accept(group)),
                 n * (6 + 2 * apart))  # fmt: skip
        cuda_diff.CHANGES, cuda_diff.WARPS["take"] = 1024, 4
        returned, done = host_ms(lambda: part.find(10**10))
        print(f"find: {returned:.3f} ms to return, {done:.3f} to the end")
        returned, done = host_ms(lambda: part.accept(group))
        print(f"accept: {returned:.3f} ms to return, {done:.3f} to the end", flush=True)
        return group

    def scatter(self, group: Any) -> None:
        n = group.indices.numel()
        apart = 32 * min(1.0, 1 / (16 * self.share))
        rows = {p.spec.name: [[_row(p.old)]] for p in self.pairs}
        numels = {p.spec.name: p.spec.numel for p in self.pairs}
        table = kernels.CudaTable(rows, numels, torch.int32, torch.int16, torch.device("cuda:0"))
        for tile, warps in sweep(self.quick, (512, 1024, 2048), (2, 4, 8)):
            kernels.PATCH, kernels.WARPS["patch"] = tile, warps
            ways: Any = table.scatter(group)
            label = f"tile {tile}, {warps} warps"
            show(f"patch, check, {label}", gpu_ms(ways.check), n * 4)
            show(f"patch, swap, {label}", gpu_ms(ways.swap), n * (8 + 2 * apart))
            ways.undo()
        kernels.PATCH, kernels.WARPS["patch"] = 512, 2
        for what, call in (("tables", lambda: table.scatter(group)), ("check", ways.check),
                           ("swap", ways.swap)):  # fmt: skip
            returned, done = host_ms(call)
            print(f"patch, {what}: {returned:.3f} ms to return, {done:.3f} to the end", flush=True)

    def sums(self) -> None:
        parts = [(seed(p.spec.name), _row(p.old)) for p in self.pairs]
        for tile, warps in sweep(self.quick, (4096, 2048, 8192, 16384), (8, 4, 16)):
            kernels.TILE, kernels.WARPS["sums"] = tile, warps
            ms = gpu_ms(lambda: kernels.CudaSums(parts).result())
            show(f"checksum of everything, host included, tile {tile}, {warps} warps", ms,
                 self.nbytes)  # fmt: skip


def _row(t: torch.Tensor) -> Row:
    return Row(t.view(-1).view(torch.int16), 0, ((t.numel(), 1, 1),))


def floor(nbytes: int) -> None:
    one, two = (torch.empty(nbytes, dtype=torch.uint8, device="cuda") for _ in range(2))
    show("floor: one device copy", gpu_ms(lambda: two.copy_(one)), 2 * nbytes)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--share", type=float, default=0.01)
    ap.add_argument("--quick", action="store_true", help="the settings in use only")
    a = ap.parse_args()
    print(torch.cuda.get_device_name(), "triton", kernels.triton.__version__)
    bench = Bench(a.share, a.quick)
    floor(bench.nbytes)
    bench.diff()
    bench.scatter(bench.changed())
    bench.sums()


if __name__ == "__main__":
    main()
