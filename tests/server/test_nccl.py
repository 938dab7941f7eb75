"""Broadcasts to two real servers at once, over gloo; `test_exact.py` has the ranks of one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.server.test_sparse import train
from tests.support import fleet, models
from tests.support.server import Server
from tests.support.toy_trainer import Faulty
from tests.support.trainer import TrainerProcess, weights
from tests.support.waiting import until
from vllm_wt_plugin import RequestError, WeightSync
from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge

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


def test_what_a_training_step_changed_reaches_two_servers(two: list[Server]) -> None:
    model = models.build("qwen3", 0)
    with connect(two) as sync:
        sync.push(model, mode="sparse")
        changed = [sync.push(model, mode="sparse").changed for _ in train(model, 12)]
        assert all(share is not None and share < 1 for share in changed)
        assert any(changed)  # in bf16 a few steps add up before anything changes
        assert sync.verify().ok
        have = [s.generations() for s in two]
    want = []
    for server in two:
        with WeightSync(server.url) as direct:
            direct.push(model)
        want.append(server.generations())
    assert have == want


def test_a_source_that_breaks_off_leaves_dirty_and_the_next_push_heals(two: list[Server]) -> None:
    class Short(Faulty):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            rows = list(super().__iter__())
            if self.fault != "short":
                yield from rows
                return
            yield from rows[: len(rows) // 2]
            time.sleep(1)  # most often they have begun to write by then

    source = Short(weights(1))
    with connect(two) as sync:
        sync.push(source, version="whole")
        good = [s.generations() for s in two]
        source.fault = "short"
        with pytest.raises(RequestError, match="ended before"):
            sync.push(source)
        for server, said in zip(two, good, strict=True):
            if server.status()["state"] == "DIRTY":
                assert server.complete([5, 6, 7]).status_code == 503
            else:  # on a busy machine it had nothing to write yet
                assert (server.status()["version"], server.generations()) == ("whole", said)
        source.fault = "none"
        sync.push(source, version="healed")
        assert [s.generations() for s in two] == good


def test_steps_of_a_bridge_reach_an_engine_on_another_node(
    two: list[Server], checkpoint: Callable[..., Path]
) -> None:
    """The bridge's distributed mode: a model of the trainer's own, sent after every step."""
    server, folder = two[0], checkpoint("qwen3", 1)
    config = BridgeConfig(
        model_name=str(folder), num_inference_nodes=1, nodes=("127.0.0.1",), tensor_port=0,
        device="cpu", vllm_api_url=server.url, timeout_seconds=60.0,
    )  # fmt: skip
    with VLLMWeightBridge(config) as bridge, WeightSync(server.url) as direct:
        model = bridge.get_trainable_model()
        optimizer = torch.optim.AdamW(bridge.parameters(), lr=3e-3)
        said = []
        for step in ("one", "two"):
            ids = torch.arange(3, 67).view(4, 16)
            model(ids, labels=ids).loss.backward()
            with bridge.update(step):
                optimizer.step()
            said.append(server.generations())
            assert server.status()["version"] == step
            direct.push(models.build("qwen3", 2))
            direct.push(model)
            assert server.generations() == said[-1]
        assert said[0] != said[1]


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
