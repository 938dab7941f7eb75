"""What the memory allows a swap of scattered bf16: plain CUDA kernels, without tables or checks.

    python -m benchmarks.swap_limits

2^31 elements, milliseconds scaled to the 8.19 G of a Qwen3-8B. `per`: elements of one thread, taken
in turn by the threads of a block; `blocks`: at most so many on a processor (0: no limit).
"""

from __future__ import annotations

import itertools
import statistics as st
from functools import partial
from typing import Any

import torch

N = 2**31 - 64
SCALE = 8.19e9 / N
WAYS = ("read", "write", "swap", "swap, the store waits for the load")
SOURCE = r"""
typedef unsigned short u16;
template<int PER, int WAY>
__device__ void swap(const int* idx, const u16* val, u16* dst, u16* kept, int n, int zero) {
  int at[PER], ix[PER]; u16 o[PER], v[PER];
  #pragma unroll
  for (int k = 0; k < PER; k++) {
    at[k] = (blockIdx.x * PER + k) * blockDim.x + threadIdx.x;
    ix[k] = at[k] < n ? idx[at[k]] : -1;
    v[k] = at[k] < n ? val[at[k]] : 0;
    o[k] = 0;
  }
  #pragma unroll
  for (int k = 0; k < PER; k++) if (WAY != 1 && ix[k] >= 0) o[k] = dst[ix[k]];
  #pragma unroll
  for (int k = 0; k < PER; k++)
    if (WAY != 0 && ix[k] >= 0) dst[ix[k]] = WAY == 3 ? (u16)(v[k] | (o[k] & zero)) : v[k];
  #pragma unroll
  for (int k = 0; k < PER; k++) if (WAY != 1 && ix[k] >= 0) kept[at[k]] = o[k];
}
"""


def kernel(per: int, way: int) -> Any:
    name = f"swap_{per}_{way}"
    entry = (
        f'extern "C" __global__ void {name}(const int* i, const u16* v, u16* d, u16* k, int n, '
        f"int zero) {{ swap<{per}, {way}>(i, v, d, k, n, zero); }}"
    )
    return torch.cuda._compile_kernel(SOURCE + entry, name)  # type: ignore[attr-defined]


def ms(call: Any) -> float:
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(300_000)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return st.median(times[1:]) * SCALE


def changed(share: float) -> torch.Tensor:
    """Ascending indices, int32."""
    parts = [
        torch.randint(a, b, (int((b - a) * share),), device="cuda").unique().int()
        for a, b in itertools.pairwise([*range(0, N, 1 << 28), N])
    ]
    return torch.cat(parts)


def main() -> None:
    kernels = {(p, w): kernel(p, w) for p in (1, 2, 8) for w in range(len(WAYS))}
    weights = torch.empty(N + 64, dtype=torch.int16, device="cuda")
    for part in weights.split(1 << 28):
        part.random_(-30000, 30000)
    print(torch.cuda.get_device_name())
    for share in (0.001, 0.01, 0.1):
        indices = changed(share)
        n = indices.numel()
        values = torch.randint(-30000, 30000, (n,), device="cuda", dtype=torch.int16)
        args = [indices, values, weights, torch.empty_like(values), n, 0]
        for (per, way), k in kernels.items():
            row = []
            for block, blocks in ((64, 0), (256, 0), (64, 8), (64, 4)):
                shared = 226 * 1024 // blocks - 1024 if blocks else 0
                if shared > 48 * 1024:
                    k.set_shared_memory_config(shared)
                grid = (n + block * per - 1) // (block * per)
                t = ms(partial(k, (grid, 1, 1), (block, 1, 1), args, shared))
                row.append(f"{block} threads, {blocks} blocks {t:.2f}")
            print(f"{share:.1%} {WAYS[way]}, per {per}: {'; '.join(row)}", flush=True)


if __name__ == "__main__":
    main()
