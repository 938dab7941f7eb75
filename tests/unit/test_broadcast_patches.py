"""Sparse pushes to real processes that run toy models, over gloo: one broadcast of what changed.

What counts: after every push all replicas hold what a fresh load of the trainer's weights would
give; and one that could not be taken leaves the version before it serving.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support import toy_trainer
from tests.support.toy_replica import ToyReplica, weights
from tests.unit.test_nccl import all_serve, connect, until
from vllm_wt_plugin.trainer.broadcast import Broadcaster
from vllm_wt_plugin.wire.patches import layout, widths

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")


@pytest.fixture(scope="module")
def pair() -> Iterator[list[ToyReplica]]:
    """A replica of one worker and one of two."""
    with ToyReplica() as one, ToyReplica(world=2) as two:
        yield [one, two]


class Trainer:
    """Tensors that become those of a seed in place, as an optimiser writes them."""

    def __init__(self, seed: int) -> None:
        self.tensors = weights(seed)

    def become(self, seed: int) -> dict[str, torch.Tensor]:
        for name, t in weights(seed).items():
            self.tensors[name].copy_(t)
        return self.tensors


@pytest.mark.parametrize("buffer_bytes", [256, 1 << 20])
def test_what_changed_reaches_all_ranks_of_all_replicas(
    pair: list[ToyReplica], buffer_bytes: int
) -> None:
    trainer = Trainer(2)
    elements = sum(t.numel() for t in trainer.tensors.values())
    with connect(*pair, buffer_bytes=buffer_bytes) as sync:
        assert sync.push(trainer.tensors, mode="sparse").changed is None  # nobody held anything
        next(t for t in trainer.tensors.values() if t.dim() == 2).view(-1)[3] += 1
        report = sync.push(trainer.tensors, version="one", mode="sparse")
        assert report.changed == pytest.approx(1 / elements)
        assert not any(r.holds(2) for r in pair)
        for seed in (2, 3):
            report = sync.push(trainer.become(seed), version=f"v{seed}", mode="sparse")
            assert report.changed is not None
            assert all_serve(pair, seed, f"v{seed}")
        sync.push(trainer.tensors, version="the same", mode="sparse")
        assert all_serve(pair, 3, "the same")


def test_a_replica_that_lacks_the_base_gets_everything(pair: list[ToyReplica]) -> None:
    trainer = Trainer(2)
    with connect(*pair) as sync, connect(pair[0]) as other:
        sync.push(trainer.tensors, mode="sparse")
        other.push(weights(3), version="of another")
        report = sync.push(trainer.become(3), version="v3", mode="sparse")
        assert [r.error for r in report.replicas] == [None, None]
        assert all_serve(pair, 3, "v3")
        assert sync.push(trainer.become(2), version="v2", mode="sparse").changed is not None
        assert all_serve(pair, 2, "v2")


@pytest.mark.parametrize("where", ["a value", "a tensor in full"])
def test_a_flipped_bit_is_found_and_everything_is_sent(
    pair: list[ToyReplica], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    patch, answers = Broadcaster.patch, []

    def flips(self: Any, patches: Any, clients: Any) -> Any:
        push = patches.push
        at = layout(widths(push.specs), push.num_updates_list, push.whole)
        patches.data[at.sections[0].values_at if where == "a value" else at.whole_at[0]] ^= 4
        answers.append(patch(self, patches, clients))
        return answers[-1]

    trainer = Trainer(2)
    monkeypatch.setattr(Broadcaster, "patch", flips)
    with connect(*pair) as sync:
        sync.push(trainer.tensors, version="v2", mode="sparse")
        sync.push(trainer.become(3), version="v3", mode="sparse")
    ((done, errors),) = answers
    assert not done
    assert any("checksum" in str(e) for e in errors.values())
    assert all_serve(pair, 3, "v3")


def test_a_trainer_that_dies_while_it_sends_patches_leaves_the_old_version(
    pair: list[ToyReplica],
) -> None:
    process = toy_trainer.start([r.url for r in pair], 3, 20.0, "patches")
    out, _ = process.communicate(timeout=60)
    assert out == "pushed\nthere\n"
    assert process.returncode == -signal.SIGKILL
    assert until(lambda: all(r.status()["state"] == "IDLE" for r in pair))
    assert all_serve(pair, 3, "process 3")
    with connect(*pair) as sync:
        sync.push(weights(2), version="v2")
        assert all_serve(pair, 2, "v2")
