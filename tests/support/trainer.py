"""A trainer by hand: the bodies that `WeightSync` would send, open to be bent, and killable."""

from __future__ import annotations

import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec
import torch

from tests.support import models
from vllm_wt_plugin import SparseWeightPatch, WeightSync
from vllm_wt_plugin.trainer.source import MappingSource
from vllm_wt_plugin.transport.ipc import Exporter
from vllm_wt_plugin.transport.patches import share

ROOT = Path(__file__).parents[2]
BUFFER = 40_000  # bytes of a packed push's buffer: a few tensors each
Json = dict[str, Any]


@cache
def weights(seed: int, kind: str = "qwen3") -> dict[str, torch.Tensor]:
    """Checkpoint tensors of `models.build(kind, seed)`; shared, so copy before changing one."""
    return {n: t.detach() for n, t in models.build(kind, seed).state_dict().items()}


def speaking(seed: int, *tokens: int) -> dict[str, torch.Tensor]:
    """`weights(seed)` with an `lm_head` that greedily says one of two `tokens`, whatever it reads:
    a token tells which weights made it. The two rows are opposite and without zeros: where a
    logit is exactly 0 (one element of bf16 hidden states is, now and then), token 0 would win."""
    head = torch.zeros_like(weights(seed)["lm_head.weight"])
    row = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(seed)) * 100
    head[tokens[0]], head[tokens[1]] = row, -row
    return weights(seed) | {"lm_head.weight": head}


class Trainer:
    """Holds the tensors in shared memory; `push` and `part` make request bodies for them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.exporter = Exporter()
        self.registration, _ = self.exporter.register(tensors.items())
        self.exporter.refresh()
        self.names, self.tensors = list(tensors), tensors

    def push(self, version: str = "by hand") -> Json:
        """A body for /push_weights, with the whole registration under an id of its own."""
        register: Json = json.loads(msgspec.json.encode(self.registration))
        register["id"] = secrets.token_hex(16)
        return {"registration": register["id"], "register": register, "version": version}

    def part(self, names: Iterable[str] | None = None) -> Json:
        """A body for /update_weights with some of the tensors (all by default)."""
        data: Json = json.loads(msgspec.json.encode(self.registration))
        rows = {r[0]: r for r in data["tensors"]}
        chosen = [rows[n] for n in (rows if names is None else names)]
        return {
            "update_info": {
                "names": [r[0] for r in chosen],
                "dtype_names": [r[1] for r in chosen],
                "shapes": [r[2] for r in chosen],
                "storages": data["storages"],
                "handles": [[r[3], r[4], r[5] if len(r) > 5 else None] for r in chosen],
            }
        }

    def patch(self, *names: str, by: float = 1.0) -> Json:
        """A body for /update_weights that adds to every second element of these tensors."""
        rows = [(n, self.tensors[n]) for n in names]
        given = [
            SparseWeightPatch(
                n, torch.arange(0, t.numel(), 2), t.reshape(-1)[::2] + by, tuple(t.shape)
            )
            for n, t in rows
        ]
        self.patches = Exporter()
        info: Json = json.loads(msgspec.json.encode(share(given, self.patches)))
        return {"update_info": info}

    def close(self) -> None:
        self.exporter.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


@cache
def trainer(seed: int) -> Trainer:
    """One trainer per seed for all tests of this process; its memory goes at exit."""
    return Trainer(weights(seed))


class TrainerProcess:
    """A trainer in a process of its own: does `steps` against a server, then waits to be killed.

    Steps: `start:LEASE_S`, `part:FROM:TO` (a slice of the names), `patch:NAME…`,
    `finish:VERSION`; or `packed:N` or `nccl:N` alone, a push through buffers that stops before
    the N-th tensor.
    """

    def __init__(self, url: str, seed: int, *steps: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.trainer", url, str(seed), *steps],
            stdout=subprocess.PIPE, cwd=ROOT, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.segments = set(self.process.stdout.readline().split())
        line = self.process.stdout.readline()
        if line.strip() != "done":
            self.kill()
            raise RuntimeError(f"the trainer failed: {line}")

    def kill(self) -> None:
        """SIGKILL: no handler runs, nothing is cleaned up. Idempotent."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.kill()


def _main(url: str, seed: str, *steps: str) -> None:
    if steps and steps[0].startswith(("packed:", "nccl:")):
        way, _, stop = steps[0].partition(":")
        return _buffers(url, weights(int(seed)), way, int(stop))
    held = Trainer(weights(int(seed)))
    print(*(s.name.strip("/") for s in held.registration.storages), flush=True)
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as http:
        for step in steps:
            path, body = _request(held, *step.split(":"))
            response = http.post(path, json=body)
            if response.status_code != 200:
                print(f"{step}: {response.text}", flush=True)
                return
    print("done", flush=True)
    signal.pause()


def _buffers(url: str, tensors: Mapping[str, torch.Tensor], way: str, stop: int) -> None:
    class Stopping(MappingSource):
        def memory(self) -> None:
            return None

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for i, pair in enumerate(super().__iter__()):
                if i == stop:
                    print("", "done", sep="\n", flush=True)
                    signal.pause()
                yield pair

    urls, backend = url.split(","), "nccl" if way == "nccl" else "ipc"
    with WeightSync(
        urls, packed=True, buffer_bytes=BUFFER, owner="the killed trainer",
        backend=backend,  # type: ignore[arg-type]
    ) as sync:  # fmt: skip
        sync.push(Stopping(tensors))


def _request(held: Trainer, verb: str, *args: str) -> tuple[str, Json]:
    match verb:
        case "start":
            body: Json = {"owner": "the killed trainer", "lease_s": float(args[0])}
            return "/start_weight_update", body
        case "part":
            return "/update_weights", held.part(held.names[int(args[0]) : int(args[1])])
        case "patch":
            return "/update_weights", held.patch(*args)
        case "finish":
            return "/finish_weight_update", {"weight_version": args[0]}
    raise KeyError(verb)


if __name__ == "__main__":
    _main(*sys.argv[1:])
