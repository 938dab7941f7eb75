"""Several replicas on toy models: who joins late, restarts or is gone, and what is sent to whom.

What counts: after a push every replica that took it serves the trainer's bits, and those that
held the last push were sent changes alone.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.unit import toys
from tests.unit.test_session import Trainer, Worker
from tests.unit.toys import same_bits
from vllm_wt_plugin.errors import (
    EngineAsleep,
    EngineDirty,
    HandleError,
    NotBegun,
    PlanError,
    RequestError,
    ServerUnreachable,
    TransferError,
    UnknownRegistration,
    VersionMismatch,
    WeightSyncError,
)
from vllm_wt_plugin.trainer import sync as module
from vllm_wt_plugin.trainer.broadcast import _restarted
from vllm_wt_plugin.trainer.client import HTTPClient, LLMClient, tell_apart
from vllm_wt_plugin.trainer.delta import Snapshot
from vllm_wt_plugin.trainer.replicas import ask
from vllm_wt_plugin.trainer.sync import WeightSync
from vllm_wt_plugin.wire import exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.replies import Held, held


class Replica:
    """A `Client` of a toy worker, which can be down, and restarts with the weights of seed 1."""

    def __init__(self, name: str) -> None:
        self.name, self.up = name, True
        self.restart()

    def restart(self) -> None:
        self.worker = Worker()
        self.worker.session.known.keeps_shadow = True
        self.sparse: list[bool] = []  # of every push that arrived
        self.stopped, self.late = False, []

    def push(self, request: msg.PushRequest | PatchPush) -> exchange.Outcome:
        self._reach()
        if self.stopped:
            self.late.append(request)
            error = ServerUnreachable("no answer in time", where=self.name)
            error.heard = True
            raise error
        done = exchange.run(exchange.push(request), self._perform)
        self.sparse.append(isinstance(request, PatchPush))
        return done

    def go_on(self) -> None:
        """Do what came while it was stopped."""
        for request in self.late:
            exchange.run(exchange.push(request), self._perform)

    def _perform(self, action: exchange.Action) -> Any:
        match action:
            case exchange.Call():
                return [self.worker.call(*action.verbs)]
            case exchange.IsPaused():
                return False

    def _reach(self) -> None:
        if not self.up:
            raise ServerUnreachable("connection refused", where=self.name)

    def checksums(self, specs: tuple[ParamSpec, ...] = ()) -> Held:
        self._reach()
        return held([self.worker.call(msg.Sums(specs=specs))], specs)

    def status(self) -> dict[str, Any]:
        return {}

    def shutdown(self) -> None:
        self._reach()

    def close(self) -> None:
        pass

    def serves(self, tensors: dict[str, torch.Tensor], version: str) -> bool:
        state = self.worker.session.state()
        want = toys.ToyHost(self.worker.kind())
        want.first_load([(n, t.clone()) for n, t in tensors.items()])
        a, b = toys.live_tensors(self.worker.host.model), toys.live_tensors(want.model)
        same = all(same_bits(a[n], b[n]) for n in b)
        return (state.phase, state.version, same) == ("IDLE", version, True)


class Run:
    """A trainer's tensors, its replicas, and pushes of small changes to them."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = replicas
        self.tensors = Trainer(2).tensors
        self.sync = WeightSync(list(replicas), token="")
        self.step = 0

    def train(self) -> None:
        for t in self.tensors.values():
            t.view(-1)[self.step % t.numel()] += 1

    def push(self, mode: Any = "sparse") -> None:
        self.step += 1
        self.train()
        self.sync.push(self.tensors, self.step, mode=mode)

    def all_serve(self) -> bool:
        return all(r.serves(self.tensors, str(self.step)) for r in self.replicas)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    monkeypatch.setattr(module, "client_for", lambda target, **_: target)
    made = Run(Replica("one"), Replica("two"))
    yield made
    made.sync.close()


def test_a_replica_that_restarts_gets_everything_once_then_changes(run: Run) -> None:
    one, two = run.replicas
    for _ in range(3):
        run.push()
    assert one.sparse == two.sparse == [False, True, True]
    two.restart()
    for _ in range(3):
        run.push()
        assert run.all_serve()
    assert one.sparse == [False, True, True, True, True, True]
    assert two.sparse == [False, True, True]


def test_an_error_of_another_kind_waits_for_the_others() -> None:
    """Who may read what the caller frees next."""
    done = []

    def what(c: Replica) -> None:
        if c.name == "one":
            raise ValueError("no error of ours")
        time.sleep(0.2)
        done.append(c.name)

    clients: Any = [Replica("one"), Replica("two")]
    with ThreadPoolExecutor(2) as pool:
        with pytest.raises(ValueError, match="of ours"):
            ask(pool, clients, what)  # type: ignore[arg-type]
        assert done == ["two"]


def test_tensors_that_move_once_are_not_compared_before_they_are_looked_at(run: Run) -> None:
    begun = []
    begin = Snapshot.begin

    def noted(self: Snapshot, source: Any) -> Any:
        begun.append(begin(self, source))
        return begun[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Snapshot, "begin", noted)
        for moves in (False, False, False, True, True, False):
            if moves:
                run.tensors |= {n: t.clone() for n, t in run.tensors.items()}
            run.push()
            assert run.all_serve()
    assert [b is None for b in begun] == [True, False, False]


@pytest.mark.parametrize(
    ("errors", "again"),
    [
        ([TransferError("lost"), NotBegun("called off")], True),
        ([NotBegun("called off"), EngineAsleep("asleep")], False),
        ([UnknownRegistration("gone"), TransferError("lost")], True),
        ([TransferError("lost")], False),
    ],
)
def test_a_lost_group_is_made_anew_and_a_refusal_heard_once(
    errors: list[WeightSyncError], again: bool
) -> None:
    assert _restarted({str(i): e for i, e in enumerate(errors)}) is again


def test_engines_in_this_process_have_names_of_their_own() -> None:
    llms = [object.__new__(LLMClient) for _ in range(3)]
    for c in llms:
        c.name = "LLM"
    tell_apart(llms)
    assert [c.name for c in llms] == ["LLM", "LLM 2", "LLM 3"]


def test_a_replica_is_given_once(run: Run) -> None:
    with pytest.raises(RequestError, match="given twice"):
        WeightSync([*run.replicas, Replica("one")], token="")


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_one_replica_does_not_wait_for_another(
    run: Run, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    run.push()
    meeting = threading.Barrier(2)
    for r in run.replicas:
        monkeypatch.setattr(r, "_reach", lambda: meeting.wait(30))
    run.push(mode)
    assert run.all_serve()
    assert [r.sparse[-1] for r in run.replicas] == [mode == "sparse"] * 2
    monkeypatch.undo()


def test_a_restart_is_noticed_though_the_version_is_the_same(run: Run) -> None:
    """Versions are the trainer's to choose, so they prove nothing: the bits do."""
    run.push()
    run.replicas[1].restart()
    run.replicas[1].worker.ok(msg.SetVersion("1"))
    run.push()
    assert run.all_serve()
    assert run.replicas[1].sparse == [False]


def test_a_replica_that_is_down_fails_the_push_and_the_others_take_it(run: Run) -> None:
    one, two = run.replicas
    two.up = False
    for _ in range(3):
        with pytest.raises(ServerUnreachable) as failed:
            run.push()
        assert [r.error is None for r in failed.value.report.replicas] == [True, False]
    assert one.serves(run.tensors, "3")
    assert one.sparse == [False, True, True]
    two.up = True  # it starts late
    run.push()
    run.push()
    assert run.all_serve()
    assert two.sparse == [False, True]


def test_dense_pushes_find_a_restarted_replica_too(run: Run) -> None:
    run.push("dense")
    run.replicas[0].restart()
    run.push("dense")
    assert run.all_serve()


def test_added_and_removed(run: Run) -> None:
    run.push()
    third = Replica("three")
    run.sync.add(third)  # type: ignore[arg-type]
    run.replicas = (*run.replicas, third)
    run.push()
    run.push()
    assert run.all_serve()
    assert third.sparse == [False, True]
    with pytest.raises(RequestError, match="in the list"):
        run.sync.add(third)  # type: ignore[arg-type]
    run.sync.remove("two")
    run.push()
    assert run.replicas[1].serves(run.tensors, "4") is False
    assert third.serves(run.tensors, "4")
    with pytest.raises(RequestError, match="not in the list"):
        run.sync.remove("two")


# ---- verify and adopt without having pushed -------------------------------------------------


def test_verify_of_what_nobody_pushed(run: Run) -> None:
    """The toys were started from seed 1; processed tensors have no copy to compare yet."""
    start = Trainer(1).tensors
    found = run.sync.verify(start)
    assert found.ok
    assert set(found.unseen["one"]) < start.keys()
    name = next(n for n in start if n not in found.unseen["one"])
    start[name].view(-1)[0] += 1
    assert run.sync.verify(start).differ == {"one": [name], "two": [name]}


@pytest.mark.parametrize("shadow", [False, True])
def test_adopted_weights_are_patched(run: Run, shadow: bool) -> None:
    """A trainer that starts anew on a checkpoint the replicas hold sends changes alone; what no
    checksum reaches is sent in full once, and is right even if it was something else."""
    run.push()
    for r in run.replicas:
        r.worker.session.known.keeps_shadow = shadow
        if not shadow:
            r.restart()
            r.worker.session.known.keeps_shadow = False
    base = run.tensors if shadow else Trainer(1).tensors
    run.tensors = {n: t.clone() for n, t in base.items()}
    again = WeightSync(list(run.replicas), token="")
    found = again.adopt(base)
    assert bool(found.unseen["one"]) is not shadow
    for name in found.unseen["one"]:  # the engine may hold anything there
        run.tensors[name] += 1
        base[name] += 1
    run.train()
    report = again.push(run.tensors, "next", mode="sparse")
    assert report.changed is not None
    assert [r.sparse[-1] for r in run.replicas] == [True, True]
    assert all(r.serves(run.tensors, "next") for r in run.replicas)
    again.close()


def test_what_is_not_held_cannot_be_adopted(run: Run) -> None:
    run.push()
    other = Trainer(3).tensors
    with pytest.raises(VersionMismatch, match="version '1' is not this source"):
        run.sync.adopt(other)
    with pytest.raises(PlanError, match="loader does not take"):
        run.sync.adopt({"no.such.weight": torch.zeros(3)})
    assert run.all_serve()


def test_dirty_weights_are_healed_by_the_next_push_whatever_its_mode(run: Run) -> None:
    run.push()
    run.replicas[0].worker.ok(msg.MarkDirty("mixed"))
    with pytest.raises(EngineDirty):
        run.replicas[0].worker.session.state().check_resumable()
    run.push()
    assert run.all_serve()


# ---- a server that answers too late ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_a_push_is_not_done_later_than_the_trainer_waits(run: Run, mode: Any) -> None:
    """It would take what the trainer fills the memory with meanwhile, for others."""
    one, two = run.replicas
    for _ in range(2):
        run.push(mode)
    held = {n: t.clone() for n, t in run.tensors.items()}
    two.stopped = True
    with pytest.raises(ServerUnreachable):
        run.push(mode)
    run.sync.remove("two")
    run.push(mode)
    assert one.serves(run.tensors, "4")
    with pytest.raises(HandleError, match="is gone"):
        two.go_on()
    assert two.serves(held, "2")


def test_an_http_client_knows_whether_its_request_was_heard() -> None:
    """Where nobody listens it was not; where somebody does and is silent it was."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        for listening in (False, True):
            if listening:
                silent.listen()
            client = HTTPClient(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.2)
            with pytest.raises(ServerUnreachable) as failed:
                client.post("/push_weights", {})
            assert failed.value.heard is listening
            client.close()
