"""The bridge's distributed mode: what is asked for, and broadcasts over gloo to a process that runs
toy models behind the real routes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch

from tests.support import models
from tests.support.ports import free_port
from tests.support.toy_replica import ToyReplica, weights
from vllm_wt_plugin import RequestError, StateError, TransferError, WeightSyncError
from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge, nodes
from vllm_wt_plugin.trainer.source import as_source

ROOT = Path(__file__).parents[2]


class Recorder:
    """Stands for `WeightSync`: keeps what it is told; refuses the version "bad"."""

    made: ClassVar[list[Recorder]] = []

    def __init__(self, urls: list[str], **options: Any) -> None:
        self.urls, self.options = urls, options
        self.pushed: list[tuple[str, float]] = []
        self.closed = False
        self.made.append(self)

    def status(self) -> list[dict[str, Any]]:
        return []

    def push(self, source: Any, version: str | int) -> None:
        if version == "bad":
            raise TransferError("the engines are gone", where="node b")
        total = sum(float(t.detach().double().sum()) for _, t in as_source(source))
        self.pushed.append((str(version), total))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    monkeypatch.setattr(nodes, "WeightSync", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder.made


def config(folder: Path | str, **options: Any) -> BridgeConfig:
    return BridgeConfig(
        model_name=str(folder), device="cpu", num_inference_nodes=2, nodes=("a", "b", "c"),
        vllm_api_url="http://localhost:9100", **options,
    )  # fmt: skip


def test_one_trainer_updates_every_inference_node(recorder: Any, tmp_path: Path) -> None:
    models.build("llama", 0).to(torch.bfloat16).save_pretrained(tmp_path)
    with VLLMWeightBridge(config(tmp_path, tensor_port=5)) as bridge:
        with pytest.raises(StateError, match="no weights to send"):
            bridge.notify_update()
        model = bridge.get_trainable_model()
        assert model.training
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        optimizer = torch.optim.SGD(bridge.parameters(), lr=0.5)
        for version in ("one", None):
            model(torch.tensor([[5, 6, 7]])).logits.float().square().mean().backward()
            with bridge.update(version=version):
                optimizer.step()
        bridge.broadcast_weights_to_inference()
        with pytest.raises(ZeroDivisionError), bridge.update():
            1 / 0  # noqa: B018
    (sync,) = recorder
    assert sync.urls == ["http://b:9100", "http://c:9100"]
    assert sync.options["backend"] == "nccl"
    assert (sync.options["host"], sync.options["port"]) == ("a", 5)
    assert [v for v, _ in sync.pushed] == ["one", "2", "3"]
    first, second, third = (total for _, total in sync.pushed)
    assert first != second == third
    assert sync.closed


def test_weights_of_the_trainers_own_are_sent(recorder: Any, tmp_path: Path) -> None:
    mine = {"w": torch.ones(3)}
    with VLLMWeightBridge(config(tmp_path)) as bridge:
        bridge.attach_to_vllm_weights(mine)
        with bridge.update("a"):
            mine["w"].add_(1)
        with pytest.raises(TransferError, match="engines are gone"):
            bridge.notify_update("bad")
    assert recorder[0].pushed == [("a", 6.0)]


def test_without_a_node_list_slurm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    with pytest.raises(RequestError, match="no node list"):
        VLLMWeightBridge(BridgeConfig(num_inference_nodes=1, device="cpu"))


@pytest.fixture(scope="module")
def replica() -> Iterator[ToyReplica]:
    with ToyReplica(world=2) as made:
        yield made


def of(replica: ToyReplica, **options: Any) -> BridgeConfig:
    """One node, this host."""
    return BridgeConfig(
        num_inference_nodes=1, nodes=("127.0.0.1",), tensor_port=0, device="cpu",
        vllm_api_url=replica.url, timeout_seconds=30.0, **options,
    )  # fmt: skip


def test_a_broadcast_arrives(replica: ToyReplica) -> None:
    mine = weights(2)
    with VLLMWeightBridge(of(replica)) as bridge:
        bridge.attach_to_vllm_weights(mine)
        bridge.broadcast_weights_to_inference()
        assert replica.serves(2, "1")
        with bridge.update("three"):
            for name, t in weights(3).items():
                mine[name].copy_(t)
        assert replica.serves(3, "three")
        assert bridge.config.urls[3] == ["127.0.0.1"]
    assert not replica.paused()


def test_trainers_meet_and_learn_what_became_of_a_push(replica: ToyReplica) -> None:
    """Two processes: rank 0 alone sends; both wait for it, and raise the same."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.test_nodes", str(rank), port, replica.url],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [p.communicate(timeout=90)[0].splitlines()[-1] for p in processes]
    assert said[0] == said[1]
    assert said[0].startswith("PlanError")
    assert "no name covers" in said[0]
    assert replica.serves(4, "four")


def _main(rank: str, port: str, url: str) -> None:
    settings = of(
        cast(ToyReplica, SimpleNamespace(url=url)),
        trainer_rank=int(rank), world_size=2, control_port=int(port),
    )  # fmt: skip
    mine = weights(4 if rank == "0" else 5)
    with VLLMWeightBridge(settings) as bridge:
        bridge.attach_to_vllm_weights(mine)
        with bridge.update("four"):
            pass
        mine.popitem()
        try:
            bridge.attach_to_vllm_weights(mine)
            bridge.notify_update("less")
        except WeightSyncError as exc:
            print(f"{type(exc).__name__}: {exc}")
        bridge.barrier()


if __name__ == "__main__":
    _main(*sys.argv[1:])
