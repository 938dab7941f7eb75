"""Data parallelism: a push reaches every engine of a server, or none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.server import Server
from vllm_wt_plugin import PlanError, WeightSync

pytestmark = [pytest.mark.server, pytest.mark.full]
PROMPTS = [[i, i + 1, i + 2] for i in range(8, 24)]


def _texts(server: Server) -> list[str]:
    """Sixteen greedy answers; vLLM spreads the requests over its engines."""
    answers = [server.complete(p, ignore_eos=True).raise_for_status().json() for p in PROMPTS]
    return [a["choices"][0]["text"] for a in answers]


def test_every_engine_takes_a_push(
    checkpoint: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    a, b = checkpoint("qwen3", 0), checkpoint("qwen3", 1)
    server = serve(a, args=("--data-parallel-size", "2"))
    before = _texts(server)
    with WeightSync(server.url) as sync:
        assert sync.status()[0]["world_size"] == 2
        sync.push(b, version="b")
        new = _texts(server)
        assert server.status()["version"] == "b"
        assert all(x != y for x, y in zip(before, new, strict=True))
        with pytest.raises(PlanError):
            sync.push({"model.norm.weight": next(iter(_tensors(a).values()))})
        assert _texts(server) == new
        assert server.status()["state"] == "IDLE"
        sync.push(a, version="a")
        assert _texts(server) == before
    # Both engines' workers are in one group, by their ranks over all engines.
    with WeightSync(server.url, backend="nccl", buffer_bytes=64 << 10) as sync:
        for folder, texts in ((b, new), (a, before)):
            sync.push(folder, version=folder.name)
            assert _texts(server) == texts


def _tensors(folder: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))
