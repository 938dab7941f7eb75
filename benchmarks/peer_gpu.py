"""`ipc` between two GPUs of a host: trainer on GPU 0, engine on GPU 1, or TP=2 over both.

    python -m benchmarks.peer_gpu --out benchmarks/results [--shape 8b] [--rounds 12]

Each worker pulls what its segments need straight from the trainer's memory, over NVLink where
that is another GPU's. `floor` copies as many bytes between the two GPUs, buffer to buffer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import engines, shapes
from benchmarks.ipc_gpu import ours, timed
from benchmarks.result import Result
from vllm_wt_plugin import WeightSync, as_source


def peer_floor_ms(nbytes: int) -> list[float]:
    pair = [torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{i}") for i in range(2)]

    def copy() -> None:
        pair[1].copy_(pair[0])
        torch.cuda.synchronize(0)
        torch.cuda.synchronize(1)

    times = timed(copy, 10)
    pair.clear()
    torch.cuda.empty_cache()
    return times


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--shape", choices=shapes.SHAPES, default="8b")
    ap.add_argument("--rounds", type=int, default=12)
    ap.add_argument("--out", type=Path, required=True)
    a = ap.parse_args()
    folder = shapes.folder(a.shape, Path("/tmp/wt-bench-peer"))
    model = shapes.trainer_model(folder, "cuda:0")
    nbytes = sum(s.nbytes for s in as_source(model).specs())
    result = Result(f"peer-gpu-{a.shape}", facts={"bytes": nbytes})
    result.add("floor: one peer copy", peer_floor_ms(nbytes))
    result.add("floor: half, peer copy", peer_floor_ms(nbytes // 2))
    small = [p for p in model.parameters() if p.dim() == 1]

    def step() -> None:  # new weights each round, cheaply
        torch._foreach_mul_(small, 1.001)

    tokens = {}
    cases = (
        ("TP=1 on GPU 1", "1", (), "floor: one peer copy"),
        ("TP=2 on both", "0,1", ("--tensor-parallel-size", "2"), "floor: half, peer copy"),
    )
    for i, (name, gpus, args, floor) in enumerate(cases):
        log = Path(f"/tmp/peer-{i}.log")
        with engines.server(folder, "ipc", 8110 + i, log, memory=0.2, gpus=gpus, args=args) as url:
            engines.wait_ready(url, log)
            row = f"ours, {name}"
            ours(result, row, url, model, a.rounds, step)
            with WeightSync(url) as sync:
                sync.push(model)
            tokens[name] = engines.tokens(url)
        result.claim(f"push, {name}, ms", result.median(row), 1.15 * result.median(floor) + 5)
        result.write(a.out)
    print("tokens", tokens, flush=True)
    result.facts["tokens"] = tokens
    print("WROTE", result.write(a.out), flush=True)


if __name__ == "__main__":
    main()
