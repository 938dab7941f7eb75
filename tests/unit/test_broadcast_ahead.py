"""Replicas that are asked for a broadcast before the trainer has looked at its tensors.

What counts: they are, where nothing has moved; and where something has, or the look fails, no
replica is left waiting, and what the trainer has is what they serve.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.support.toy_replica import ToyReplica, weights
from tests.unit.test_nccl import all_serve, connect, until
from vllm_wt_plugin.errors import WeightSyncError
from vllm_wt_plugin.trainer.client import HTTPClient
from vllm_wt_plugin.trainer.listing import Lister

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")


@pytest.fixture(scope="module")
def pair() -> Iterator[list[ToyReplica]]:
    """A replica of one worker and one of two."""
    with ToyReplica() as one, ToyReplica(world=2) as two:
        yield [one, two]


@pytest.fixture
def looking(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What is called while the trainer looks at its tensors, each once."""
    calls, look = [], Lister.list

    def slow(self: Lister, given: object) -> Any:
        if calls:
            calls.pop(0)()
        return look(self, given)

    monkeypatch.setattr(Lister, "list", slow)
    return calls


def become(tensors: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """As an optimiser writes them."""
    for name, t in weights(seed).items():
        tensors[name].copy_(t)
    return tensors


def all_begun(pair: list[ToyReplica]) -> bool:
    return until(lambda: {r.status()["state"] for r in pair} == {"UPDATING"})


def none_begun(pair: list[ToyReplica]) -> None:
    assert {r.status()["state"] for r in pair} == {"IDLE"}


def test_replicas_have_begun_while_the_trainer_looks(
    pair: list[ToyReplica], looking: list[Callable[[], object]]
) -> None:
    tensors = weights(2)
    with connect(*pair) as sync:
        looking.append(lambda: none_begun(pair))  # they know nothing of these tensors yet
        sync.push(tensors, version="first")
        begun = []
        for seed in (3, 2):
            looking.append(lambda: begun.append(all_begun(pair)))
            sync.push(become(tensors, seed), version=f"v{seed}")
            assert all_serve(pair, seed, f"v{seed}")
    assert begun == [True, True]


def test_a_tensor_that_has_moved_is_what_they_get(
    pair: list[ToyReplica], looking: list[Callable[[], object]]
) -> None:
    tensors = weights(2)
    with connect(*pair) as sync:
        sync.push(tensors, version="first")
        for name in list(tensors)[:2]:
            tensors[name] = tensors[name].clone()  # those of before stay what they were
        become(tensors, 3)
        looking.append(lambda: all_begun(pair))
        sync.push(tensors, version="moved")
        assert all_serve(pair, 3, "moved")
        looking.append(lambda: none_begun(pair))  # tensors that move once move again
        sync.push(become(tensors, 2), version="again")
        assert all_serve(pair, 2, "again")


def test_a_look_that_fails_leaves_nobody_waiting(
    pair: list[ToyReplica], looking: list[Callable[[], object]]
) -> None:
    def fails() -> None:
        assert all_begun(pair)
        raise RuntimeError("the trainer's tensors are gone")

    tensors = weights(2)
    with connect(*pair) as sync:
        sync.push(tensors, version="first")
        looking.append(fails)
        with pytest.raises(RuntimeError, match="are gone"):
            sync.push(become(tensors, 3), version="never")
        assert all_serve(pair, 2, "first")
        assert not any(r.paused() for r in pair)
        sync.push(tensors, version="next")
        assert all_serve(pair, 3, "next")


def test_a_request_that_its_abort_overtakes_does_not_begin(
    pair: list[ToyReplica],
    looking: list[Callable[[], object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    push = HTTPClient.push

    def late(self: HTTPClient, request: Any, *more: Any) -> Any:
        time.sleep(0.5)
        return push(self, request, *more)

    def fails() -> None:
        raise RuntimeError("the trainer's tensors are gone")

    tensors = weights(2)
    with connect(*pair) as sync:
        sync.push(tensors, version="first")
        looking.append(fails)
        with monkeypatch.context() as patched:
            patched.setattr(HTTPClient, "push", late)
            with pytest.raises(RuntimeError, match="are gone"):
                sync.push(become(tensors, 3), version="never")
        assert all_serve(pair, 2, "first")
        sync.push(tensors, version="next")
        assert all_serve(pair, 3, "next")


def test_a_group_that_is_lost_is_made_anew_though_its_abort_overtakes(
    pair: list[ToyReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas that served another trainer meanwhile: the first group's end is seen at once."""
    push = HTTPClient.push

    def late(self: HTTPClient, request: Any, *more: Any) -> Any:
        time.sleep(0.5)
        return push(self, request, *more)

    tensors = weights(2)
    with connect(*pair) as sync:
        sync.push(tensors, version="first")
        with connect(*pair) as other:
            other.push(weights(3), version="other")
        with monkeypatch.context() as patched:
            patched.setattr(HTTPClient, "push", late)
            sync.push(tensors, version="next")
        assert all_serve(pair, 2, "next")


def test_a_replica_that_dies_meanwhile_fails_the_push_and_no_more(
    looking: list[Callable[[], object]],
) -> None:
    with ToyReplica() as one, ToyReplica() as two, connect(one, two) as sync:
        tensors = weights(2)
        sync.push(tensors, version="first")

        def dies() -> None:
            assert all_begun([one, two])
            two.signal(9)
            two.start()
            two.wait()

        looking.append(dies)
        with pytest.raises(WeightSyncError, match="closed connection"):
            sync.push(become(tensors, 3), version="never")
        assert until(lambda: one.serves(2, "first"))
        sync.push(tensors, version="second")
        assert all_serve([one, two], 3, "second")
