"""Several API processes of one engine: each has a lock of its own, the workers have the turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.test_session import Clock, Worker
from vllm_wt_plugin.errors import UpdateInProgress, WeightSyncError
from vllm_wt_plugin.wire import exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.worker import turn


class Engine:
    """One worker behind an engine core: pause, resume (not while an update is open), version."""

    def __init__(self) -> None:
        self.worker = Worker()
        self.worker.session.turn.shared = True
        self.paused = False
        self.version, self.stale = "default", False

    def perform(self, action: exchange.Action) -> Any:
        match action:
            case exchange.Call(verbs):
                reply = self.worker.call(*verbs)
                wrote = any(isinstance(v, msg.Apply) for v in verbs) and reply.error is None
                assert not wrote or self.paused, "written while requests run"
                self.stale |= wrote
                return [reply]
            case exchange.IsPaused():
                return self.paused
            case exchange.Pause():
                self.paused = True
            case exchange.ResetCaches():
                self.stale = False
            case exchange.SetVersion(version):
                self.version = version
            case exchange.Resume():
                self.worker.state.check_resumable()
                assert not self.stale, "resumed with caches of old weights"
                self.paused = False
        return None


class Process:
    """An API process in the middle of an update: `step` performs one action."""

    def __init__(self, engine: Engine, steps: exchange.Steps) -> None:
        self.engine, self.steps = engine, steps
        self.result: exchange.Outcome | None = None
        self.error: Exception | None = None
        self._next: Callable[[], exchange.Action] = lambda: next(steps)

    @property
    def done(self) -> bool:
        return self.result is not None or self.error is not None

    def step(self) -> None:
        try:
            action = self._next()
        except StopIteration as stop:
            self.result = stop.value
            return
        except WeightSyncError as exc:
            self.error = exc
            return
        try:
            answer = self.engine.perform(action)
        except WeightSyncError as exc:
            raised = exc
            self._next = lambda: self.steps.throw(raised)
        else:
            self._next = lambda: self.steps.send(answer)


def request(engine: Engine, seed: int) -> msg.PushRequest:
    reg = engine.worker.trainer(seed).register()
    return msg.PushRequest(reg.id, reg, f"v{seed}", f"trainer {seed}")


def interleaved(engine: Engine, order: tuple[int, ...]) -> list[Process]:
    """Two pushes, steps in this order and then to their ends."""
    both = [Process(engine, exchange.push(request(engine, seed))) for seed in (2, 3)]
    for i in itertools.chain(order, (0,) * 20, (1,) * 20):
        if not both[i].done:
            both[i].step()
    return both


STEPS = 9  # of one push: paused?, begin, pause, apply and commit, caches, version, resume, turn


@pytest.mark.parametrize("at", range(STEPS + 1))
@pytest.mark.parametrize("inside", range(STEPS + 1))
def test_two_pushes_in_any_order_leave_one_of_them_served(at: int, inside: int) -> None:
    """The first gets `at` steps, the second `inside`, then each the rest: whoever is refused is
    told so, and the engine serves, running, what its version says."""
    engine = Engine()
    both = interleaved(engine, (0,) * at + (1,) * inside)
    won = [i for i, p in enumerate(both) if p.error is None]
    assert won
    assert all(isinstance(p.error, UpdateInProgress | None) for p in both)
    assert not engine.paused
    assert engine.worker.state.phase == "IDLE"
    assert engine.worker.state.version == engine.version
    assert engine.worker.holds(int(engine.version[1:]))
    engine.worker.session.turn.check("another update")


def test_a_process_that_dies_keeps_its_turn_for_a_lease_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(turn, "time", clock)
    engine = Engine()
    first = Process(engine, exchange.push(request(engine, 2)))
    for _ in range(4):  # committed, and gone
        first.step()
    assert engine.paused
    second = Process(engine, exchange.push(request(engine, 3)))
    while not second.done:
        second.step()
    assert isinstance(second.error, UpdateInProgress)
    assert "about to end" in str(second.error)
    clock.now += 61
    third = Process(engine, exchange.push(request(engine, 3)))
    while not third.done:
        third.step()
    assert third.error is None
    assert engine.worker.holds(3)
    assert not engine.paused  # by the update that came after the dead one
