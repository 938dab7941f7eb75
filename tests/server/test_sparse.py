"""Sparse pushes into real servers: the same bits as dense ones, whatever gets lost on the way."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.drills.load import Model, says
from tests.support import models
from tests.support.offline import ask_server, differences
from tests.support.server import Server
from vllm_wt_plugin import ServerUnreachable, WeightSync

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


@pytest.mark.full
def test_a_server_that_restarts_amid_a_run(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """It gets everything once and changes from then on; the other one changes all along."""
    servers = [
        Server(checkpoint("qwen3", 1), tmp_path / f"{i}.log", env={"WT_CPU_INPLACE": "1"})
        for i in range(2)
    ]
    model = Model()

    def push(version: int) -> list[str]:
        """What each server says that it took."""
        model.become(version)
        sync.push(model.tensors, version, mode="sparse")
        last = [s.status()["last_push"] for s in servers]
        assert [x["version"] for x in last] == [str(version)] * 2
        return [x["kind"] for x in last]

    with servers[0] as stays, servers[1] as restarts:
        with WeightSync([s.url for s in servers]) as sync:
            assert push(1) == ["dense", "dense"]
            assert push(2) == ["sparse", "sparse"]
            restarts.signal(signal.SIGKILL)
            model.become(3)
            with pytest.raises(ServerUnreachable) as failed:
                sync.push(model.tensors, 3, mode="sparse")
            assert [r.error is None for r in failed.value.report.replicas] == [True, False]
            assert stays.status()["last_push"]["kind"] == "sparse"
            restarts.start()
            assert push(4) == ["sparse", "dense"]
            assert push(5) == ["sparse", "sparse"]
            found = sync.verify()
        assert found.ok
        assert not any(found.unseen.values())
        said = [s.complete([5, 6, 7], return_token_ids=True).json()["choices"][0] for s in servers]
    assert set(said[0]["token_ids"]) <= set(says(5))
    assert said[0]["token_ids"] == said[1]["token_ids"]
