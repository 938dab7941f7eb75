"""Sparse pushes into real servers: the same bits as dense ones, whatever gets lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.offline import ask_server, differences
from tests.support.server import Server
from vllm_wt_plugin import WeightSync

pytestmark = pytest.mark.server

STEPS = 20


def train(model: Any, steps: int) -> Any:
    """A small real training run in bf16 with float32 masters; yields after every step."""
    masters = {n: p.detach().float() for n, p in model.named_parameters()}
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model.requires_grad_(True)
        ids = torch.randint(3, 250, (2, 24), generator=g)
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                masters[n] -= 3e-4 * torch.sign(p.grad.float()) * masters[n].abs()
                p.copy_(masters[n])
                p.grad = None
        model.requires_grad_(False)
        yield


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("qwen3", "inplace"),
        ("qwen3_moe", "packed"),
        pytest.param("qwen3_moe", "inplace", marks=pytest.mark.full),
        pytest.param("qwen3", "packed", marks=pytest.mark.full),
    ],
)
def test_twenty_steps(
    checkpoint: Callable[..., Path], kind: str, mode: str, tmp_path: Path
) -> None:
    env = {"WT_CPU_INPLACE": "1"} if mode == "inplace" else {}
    model = models.build(kind, 0)
    # A server of its own, gone afterwards: those that live to the session's end fill the memory.
    with (
        Server(checkpoint(kind, 0), tmp_path / "server.log", env=env) as server,
        WeightSync(server.url) as sync,
    ):
        first = sync.push(model, mode="auto")
        assert first.changed is None
        print(first)
        for _ in train(model, STEPS):
            report = sync.push(model, mode="sparse")
            assert report.changed is not None
            print(report)
        assert sync.verify().ok
        sparse = ask_server(server)
        sync.push(model)
        assert not differences(ask_server(server), sparse)
