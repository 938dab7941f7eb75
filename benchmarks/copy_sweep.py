"""Which tile, warps and grid copy fastest: the batched copy over a Qwen3-8B's tensors.

    python -m benchmarks.copy_sweep

Prints GB/s read + written for each setting, for `copy_` one by one, and for one large buffer.
"""

from __future__ import annotations

import itertools
import statistics as st
import time
from collections.abc import Callable

import torch

from benchmarks import shapes
from vllm_wt_plugin.worker.plan import batch, kernels


def tensors(fused: bool) -> list[torch.Tensor]:
    """The weights of 36 layers and two embeddings, as separate allocations."""
    c = shapes.SHAPES["8b"]
    h, i, kv = c["hidden_size"], c["intermediate_size"], 1024
    layer = [(h + 2 * kv, h), (h, h), (2 * i, h), (h, i)]
    if not fused:
        layer = [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i), (h,), (h,)]
    sizes = [(c["vocab_size"], h)] * 2 + layer * 36
    return [torch.empty(s, dtype=torch.bfloat16, device="cuda").normal_() for s in sizes]


def ms(f: Callable[[], object], rounds: int = 7) -> float:
    out = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        out.append((time.perf_counter() - start) * 1e3)
    return st.median(out[1:])


def main() -> None:
    src = tensors(fused=False)
    pairs = [(torch.empty_like(t), t) for t in src]
    nbytes = sum(t.nbytes for t in src)
    one = torch.empty(nbytes // 2, dtype=torch.uint8, device="cuda")
    two = torch.empty_like(one)

    def show(name: str, t: float) -> None:
        print(f"{name}: {t:.2f} ms, {2 * nbytes / t / 1e6:.0f} GB/s", flush=True)

    show("one buffer", ms(lambda: (two.copy_(one), two.copy_(one))))
    show("copy_ each", ms(lambda: [d.copy_(s) for d, s in pairs]))
    for tile, warps in itertools.product((1024, 2048, 4096, 8192, 16384), (2, 4, 8)):
        batch.TILE = kernels.TILE = tile
        kernels.WARPS = warps
        show(f"tile {tile} warps {warps}", ms(batch.Batch(pairs).run))


if __name__ == "__main__":
    main()
