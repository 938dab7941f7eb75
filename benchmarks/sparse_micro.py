"""Each kernel of sparse pushes alone, over tiles and warps, on a Qwen3-8B's tensors.

    python -m benchmarks.sparse_micro [--share 0.01] [--quick]

Prints GPU milliseconds (events, median) with the bytes a kernel must move, and milliseconds of
the host for the calls that launch them. `_put` and `_swap` move 32-byte sectors for
elements that lie apart; their bytes are counted so.
"""

from __future__ import annotations

import argparse
import itertools
import statistics as st
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton

from benchmarks.copy_sweep import tensors
from vllm_wt_plugin.sparse import cuda_diff, cuda_sums, kernels
from vllm_wt_plugin.sparse.checksum import seed
from vllm_wt_plugin.sparse.diff import Pair
from vllm_wt_plugin.sparse.scatter import Row
from vllm_wt_plugin.wire.params import ParamSpec


def gpu_ms(
    f: Callable[[], object], rounds: int = 7, before: Callable[[], object] = lambda: None
) -> float:
    times = []
    for _ in range(rounds + 2):
        before()
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

    def diff(self) -> Any:
        """Reads both copies; then only what has changed."""
        part: Any = cuda_diff.CudaPart(self.pairs)
        group = part.begin()(10**10).group
        n = group.indices.numel()
        for tile in (8192,) if self.quick else (8192, 4096, 16384):
            cuda_diff.TILE = tile
            part = cuda_diff.CudaPart(self.pairs)
            part.begin()(10**10)  # finds how much room it needs
            label = f"tile {tile}"
            found = gpu_ms(lambda p=part: p._found([], p._room))
            show(f"find and move, {label}", found, 2 * self.nbytes + 18 * n)
        cuda_diff.TILE = 8192
        apart = 32 * min(1.0, 1 / (16 * self.share))  # bytes per element read at its place
        part = cuda_diff.CudaPart(self.pairs)
        returned, done = host_ms(lambda: part.begin()(10**10))
        print(f"find: {returned:.3f} ms to return, {done:.3f} to the end")
        before = replace(group, values=torch.cat([
            p.old.view(torch.int16).view(-1)[i.long()]
            for p, (_, i, _) in zip(self.pairs, group.rows(), strict=True)
        ]))  # fmt: skip
        put = gpu_ms(lambda: part.accept(group), before=lambda: part.accept(before))
        show("put", put, n * (6 + 2 * apart))
        part.accept(before)
        return group

    def scatter(self, group: Any) -> None:
        n = group.indices.numel()
        apart = 32 * min(1.0, 1 / (16 * self.share))
        rows = {p.spec.name: [[_row(p.old)]] for p in self.pairs}
        numels = {p.spec.name: p.spec.numel for p in self.pairs}
        table = kernels.CudaTable(rows, numels, torch.int32, torch.int16, torch.device("cuda:0"))
        for tile, warps in sweep(self.quick, (1024, 512, 256), (16, 8, 4)):
            kernels.PATCH, kernels.WARPS["swap"] = tile, warps
            ways: Any = table.scatter(group)
            label = f"tile {tile}, {warps} warps"
            show(f"patch, check, {label}", gpu_ms(ways.check), n * 4)
            swap = gpu_ms(ways.swap, before=ways.undo)
            show(f"patch, swap, {label}", swap, n * (8 + 2 * apart))
            ways.undo()
        kernels.PATCH, kernels.WARPS["swap"] = 1024, 8
        for what, call in (("tables", lambda: table.scatter(group)), ("check", ways.check)):
            returned, done = host_ms(call)
            print(f"patch, {what}: {returned:.3f} ms to return, {done:.3f} to the end", flush=True)

    def sums(self) -> None:
        parts = [(seed(p.spec.name), _row(p.old)) for p in self.pairs]
        for tile, warps in sweep(self.quick, (8192, 16384, 4096), (4, 8, 16)):
            cuda_sums.TILE, cuda_sums.WARPS = tile, warps
            sums = cuda_sums.CudaSums(parts)
            ms = gpu_ms(sums.begin)
            show(f"checksum of everything, tile {tile}, {warps} warps", ms, self.nbytes)


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
    print(torch.cuda.get_device_name(), "triton", triton.__version__)
    bench = Bench(a.share, a.quick)
    floor(bench.nbytes)
    bench.scatter(bench.diff())
    bench.sums()


if __name__ == "__main__":
    main()
