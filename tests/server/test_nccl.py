"""Broadcasts to two real servers at once, over gloo; `test_exact.py` has the ranks of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support import fleet, models
from tests.support.fleet import until
from tests.support.server import Server
from tests.support.toy_trainer import Faulty
from tests.support.trainer import TrainerProcess, weights
from vllm_wt_plugin import RequestError, WeightSync

pytestmark = pytest.mark.server
BUFFER = 64 << 10


@pytest.fixture(scope="module")
def two(checkpoint: Callable[..., Path], serve: Callable[..., Server]) -> list[Server]:
    return [serve(checkpoint("qwen3", 0)), fleet.plain(serve, checkpoint)]


def connect(servers: list[Server]) -> WeightSync:
    return WeightSync([s.url for s in servers], backend="nccl", buffer_bytes=BUFFER, timeout_s=60)


def test_two_servers_take_one_broadcast(two: list[Server]) -> None:
    with connect(two) as sync:
        for seed in (2, 1):
            want = []
            for server in two:
                with WeightSync(server.url) as direct:
                    direct.push(weights(seed), version="direct")
                want.append(server.generations())
            sync.push(weights(0))
            assert [s.generations() for s in two] != want
            report = sync.push(weights(seed), version=f"seed {seed}")
            assert [s.generations() for s in two] == want
            assert {s.status()["version"] for s in two} == {f"seed {seed}"}
            assert len(report.replicas) == 2
    assert want[1] == fleet.fresh(1)


def test_a_source_that_breaks_off_leaves_dirty_and_the_next_push_heals(two: list[Server]) -> None:
    class Short(Faulty):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            rows = list(super().__iter__())
            return iter(rows[: len(rows) // 2] if self.fault == "short" else rows)

    source = Short(weights(1))
    with connect(two) as sync:
        sync.push(source, version="whole")
        good = [s.generations() for s in two]
        source.fault = "short"
        with pytest.raises(RequestError, match="ended before"):
            sync.push(source)
        assert {s.status()["state"] for s in two} == {"DIRTY"}
        assert {s.complete([5, 6, 7]).status_code for s in two} == {503}
        source.fault = "none"
        sync.push(source, version="healed")
        assert [s.generations() for s in two] == good


@pytest.mark.full
def test_a_trainer_killed_in_mid_broadcast(two: list[Server]) -> None:
    with connect(two) as sync:
        sync.push(models.build("qwen3", 1), version="whole")
        good = [s.generations() for s in two]
        with TrainerProcess(",".join(s.url for s in two), 2, "nccl:12") as dying:
            assert {s.status()["state"] for s in two} == {"UPDATING"}
            dying.kill()
        assert until(lambda: all(s.status()["state"] == "DIRTY" for s in two), 15)
        sync.push(models.build("qwen3", 1), version="healed")
        assert [s.generations() for s in two] == good
