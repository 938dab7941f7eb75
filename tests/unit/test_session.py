"""The update session of a worker, on a toy model, with tensors shared in this process.

What counts: while IDLE the model equals a fresh load of the checkpoint committed last, bit for
bit; otherwise the session says DIRTY; and `call` never raises, whatever it is given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit import toys
from tests.unit.toys import ToyHost, fresh, same_bits, specs_of
from vllm_wt_plugin.errors import PlanError
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.transport.memory import MemoryExporter
from vllm_wt_plugin.wire import exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.buckets import cut
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.worker import known
from vllm_wt_plugin.worker import session as module
from vllm_wt_plugin.worker.known import KEEP
from vllm_wt_plugin.worker.plan import update
from vllm_wt_plugin.worker.session import WorkerSession

A, B, C = ("a" * 32, "b" * 32, "c" * 32)


class Model(toys.Whole):
    """In place, packed, late, through the loader, and tied."""

    parts: ClassVar = {
        "mla": toys.MLA,
        "packed": toys.TOYS["processed_pack_empty"],
        "values": toys.ReadsValues,
        "tied": toys.TiedPacked,
    }


class Clock:
    """`time`, with a monotonic clock that the test moves."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class Trainer:
    """Tensors of one seed, shared under a registration that stays."""

    def __init__(self, seed: int, kind: type[toys.Toy] = Model) -> None:
        self.tensors = toys.checkpoint(kind(), seed)
        self.exporter = MemoryExporter()

    def register(self, *names: str) -> Registration:
        chosen = self.tensors if not names else {n: self.tensors[n] for n in names}
        return self.exporter.register(chosen.items())[0]


class Worker:
    """A session, the clock it reads, and the trainers it talks to."""

    def __init__(self, kind: type[toys.Toy] = Model, rank: int = 0, world: int = 1) -> None:
        self.kind = kind
        self.host = fresh(kind, 1, rank % world, world)
        self.importer = Importer()
        self.hosts_made = 0
        self.logged: list[Any] = []
        self.committed = self.synchronized = 0
        self.trainers: dict[int, Trainer] = {}
        self.session = WorkerSession(
            self._host,
            self.importer,
            rank=rank,
            log=lambda *args, **_: self.logged.append(args),
            after_commit=self._after_commit,
            synchronize=self._synchronize,
        )

    def _host(self) -> ToyHost:
        self.hosts_made += 1
        return self.host

    def _after_commit(self) -> None:
        self.committed += 1

    def _synchronize(self) -> None:
        self.synchronized += 1

    def trainer(self, seed: int) -> Trainer:
        return self.trainers.setdefault(seed, Trainer(seed, self.kind))

    def call(self, *verbs: msg.Verb) -> msg.Reply:
        return msgspec.convert(self.session.call(msg.encode_verbs(*verbs)), msg.Reply)

    def ok(self, *verbs: msg.Verb) -> msg.Reply:
        reply = self.call(*verbs)
        assert reply.error is None, reply.error
        return reply

    def refused(self, code: str, *verbs: msg.Verb) -> dict[str, str]:
        reply = self.call(*verbs)
        assert reply.error is not None
        assert reply.error["code"] == code, reply.error
        return reply.error

    @property
    def state(self) -> msg.State:
        return self.call(msg.Status()).state

    def begin(self, key: str = A, owner: str = "me", resume: bool = False) -> msg.Begin:
        return msg.Begin(key, owner, 60.0, resume)

    def prepare(self, seed: int, key: str = A, *names: str) -> msg.Prepare:
        reg = self.trainer(seed).register(*names)
        return msg.Prepare(key, reg.id, reg, not names)

    def push(self, seed: int, key: str = A, resume: bool = False) -> msg.Reply:
        self.ok(self.begin(key, resume=resume), self.prepare(seed, key))
        return self.ok(msg.Apply(key), msg.Commit(key, f"v{seed}"))

    def holds(self, seed: int) -> bool:
        want = fresh(self.kind, seed)
        a, b = toys.live_tensors(self.host.model), toys.live_tensors(want.model)
        return a.keys() == b.keys() and all(same_bits(a[n], b[n]) for n in a)


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    yield
    assert toys.HEAP.errors == []


# ---- a push -------------------------------------------------------------------------------


def test_a_push_from_begin_to_commit(worker: Worker) -> None:
    assert worker.state == msg.State("IDLE", "default")
    assert worker.hosts_made == 0
    begun = worker.ok(worker.begin(resume=True))
    assert begun.state.phase == "UPDATING"
    assert (begun.state.owner, begun.state.session, begun.state.wrote) == ("me", A, False)
    assert 59 < begun.state.lease_left_s <= 60
    assert abs(begun.state.since - time.time()) < 5
    ready = worker.ok(worker.prepare(2))
    assert ready.report is not None
    assert ready.report.opaque.keys() == {"values.scaled"}
    assert {"plan", "open", "wait"} <= ready.seconds.keys()
    assert worker.holds(1)
    assert worker.ok(msg.Apply(A)).state.wrote
    done = worker.ok(msg.Commit(A, "v2"))
    assert done.state == msg.State("IDLE", "v2")
    assert done.info["resume"] is True
    assert worker.holds(2)
    assert (worker.committed, worker.hosts_made) == (1, 1)
    assert worker.synchronized >= 1


def test_a_second_push_sends_no_table_and_makes_no_plan(worker: Worker) -> None:
    worker.push(2)
    reg = worker.trainer(2).register()
    worker.trainer(2).tensors["mla.other.weight"].mul_(3)
    worker.ok(worker.begin())
    ready = worker.ok(msg.Prepare(A, reg.id, None, True))
    assert ready.report is None
    assert "plan" not in ready.seconds
    worker.ok(msg.Apply(A), msg.Commit(A, None))
    assert worker.state.version == "v2"
    other = worker.host.model.get_parameter("mla.other.weight")
    assert torch.equal(other, worker.trainer(2).tensors["mla.other.weight"])
    assert worker.ok(msg.Status()).info["registrations"] == [reg.id]


def test_a_push_at_once_looks_at_no_tensor_by_itself(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time it takes longer than to copy them all, where an MoE has 11,000."""
    worker.push(2)

    def walked(*args: Any) -> Any:
        raise AssertionError("the tensors are walked once more")

    monkeypatch.setattr(update, "_copies", walked)
    worker.push(3)
    worker.push(2)
    assert worker.holds(2)


def test_back_and_forth(worker: Worker) -> None:
    for seed in (2, 3, 2, 1):
        worker.push(seed)
        assert worker.holds(seed)
        assert worker.state.version == f"v{seed}"


def test_nothing_is_read_of_the_trainer_after_the_commit(worker: Worker) -> None:
    worker.push(2)
    for t in worker.trainer(2).tensors.values():
        t.view(torch.uint8).fill_(0xAA)
    assert worker.holds(2)


# ---- refusals -----------------------------------------------------------------------------


def test_a_second_update_is_told_who_and_since_when(worker: Worker) -> None:
    worker.ok(worker.begin(owner="trainer-7"))
    error = worker.refused("UpdateInProgress", worker.begin(B, "other"))
    since = time.strftime("%H:", time.gmtime())
    assert "trainer-7" in error["error"]
    assert since in error["error"] or "23:" in error["error"]
    assert "abort" in error["next_step"]
    assert worker.state.session == A


@pytest.mark.parametrize("verb", [msg.SetVersion("9"), msg.Shutdown()], ids=repr)
def test_what_an_open_update_forbids(worker: Worker, verb: msg.Verb) -> None:
    worker.ok(worker.begin())
    worker.refused("UpdateInProgress", verb)
    assert worker.state.version == "default"


@pytest.mark.parametrize("wrote", [False, True])
def test_a_stranger_cannot_end_a_half_done_update(worker: Worker, wrote: bool) -> None:
    """Not by a push of its own, not by garbage, not under another session."""
    worker.ok(worker.begin(), worker.prepare(2))
    if wrote:
        worker.ok(msg.Apply(A))
    worker.refused("UpdateInProgress", worker.begin(B), worker.prepare(3, B))
    worker.refused("NoUpdate", msg.Apply(B))
    worker.refused("NoUpdate", msg.Commit(B, "x"))
    worker.refused("UpdateInProgress", msg.Shutdown())
    worker.ok(msg.Abort(B, "mine failed"))
    worker.session.call("garbage")
    assert worker.state.session == A
    worker.ok(*([] if wrote else [msg.Apply(A)]), msg.Commit(A, "v2"))
    assert worker.holds(2)


@pytest.mark.parametrize(
    "verb",
    [msg.Apply(A), msg.Commit(A, "1"), msg.Apply(""), msg.Commit("", "1"), msg.Bucket("", 0)],
)
def test_nothing_is_open(worker: Worker, verb: msg.Verb) -> None:
    assert "start" in worker.refused("NoUpdate", verb)["next_step"]


def test_another_session_is_not_this_one(worker: Worker) -> None:
    worker.ok(worker.begin(A))
    worker.refused("NoUpdate", worker.prepare(2, B))
    worker.refused("NoUpdate", msg.Commit(B, None))
    worker.ok(worker.prepare(2, ""))  # the open one, whichever that is


def test_apply_needs_a_preparation_of_its_own(worker: Worker) -> None:
    worker.ok(worker.begin())
    worker.refused("NoUpdate", msg.Apply(A))
    worker.ok(worker.prepare(2), msg.Apply(A))
    worker.refused("NoUpdate", msg.Apply(A))
    assert worker.state.phase == "DIRTY"  # the update had written, and it is over


def test_a_bucket_needs_an_announcement(worker: Worker) -> None:
    worker.ok(worker.begin())
    worker.refused("NoUpdate", msg.Bucket(A, 0))


@pytest.mark.parametrize("register", [False, True])
def test_unknown_handles_are_asked_for(worker: Worker, register: bool) -> None:
    worker.ok(worker.begin())
    reg = worker.trainer(2).register() if register else None
    error = worker.refused("UnknownRegistration", msg.Prepare(A, C, reg, True))
    assert "send the registration again" in error["next_step"]
    assert worker.state.phase == "UPDATING"
    worker.ok(worker.prepare(2))


def test_an_id_stays_with_its_tensors(worker: Worker) -> None:
    worker.push(2)
    reg = worker.trainer(2).register()
    other = worker.trainer(3).register()
    stolen = msgspec.structs.replace(other, id=reg.id)
    worker.ok(worker.begin())
    worker.refused("HandleError", msg.Prepare(A, reg.id, stolen, True))
    worker.ok(msg.Prepare(A, reg.id, reg, True))


def test_memory_that_is_gone_is_found_before_anything_is_written(worker: Worker) -> None:
    worker.push(2)
    reg = worker.trainer(2).register()
    worker.trainer(2).exporter.close()
    worker.ok(worker.begin())
    worker.refused("HandleError", msg.Prepare(A, reg.id, None, True))
    worker.ok(msg.Abort(A, "so be it"))
    assert worker.state == msg.State("IDLE", "v2")
    assert worker.holds(2)


def test_names_that_do_not_fit_are_refused_before_anything_is_written(worker: Worker) -> None:
    worker.ok(worker.begin())
    tensors = worker.trainer(2).tensors
    wrong = {n: t for n, t in tensors.items() if n != "mla.other.weight"}
    reg = worker.trainer(2).exporter.register(wrong.items())[0]
    error = worker.refused("PlanError", msg.Prepare(A, reg.id, reg, True))
    assert error["where"] == "mla.other.weight rank 0"
    assert worker.ok(msg.Status()).info["registrations"] == []
    worker.ok(msg.Abort(A, "wrong"))
    assert worker.holds(1)


def test_tied_values_that_differ_are_refused_every_time() -> None:
    worker = Worker(toys.Retied)
    tensors = worker.trainer(2).tensors
    tensors["lm_head.weight"] = tensors["embed.weight"] + 1
    for key in (A, B):
        worker.ok(worker.begin(key))
        worker.refused("PlanError", worker.prepare(2, key))
        worker.ok(msg.Abort(key, ""))
    assert worker.holds(1)
    tensors["lm_head.weight"].copy_(tensors["embed.weight"])
    worker.push(2)
    assert worker.holds(2)


def test_asleep(worker: Worker) -> None:
    worker.session.asleep = {"weights", "kv_cache"}
    error = worker.refused("EngineAsleep", worker.begin())
    assert "wake_up" in error["next_step"]
    assert worker.state.asleep == ("kv_cache", "weights")
    worker.session.asleep = {"kv_cache"}
    assert worker.push(2).state.asleep == ("kv_cache",)


@pytest.mark.parametrize("verb", [msg.Apply(A), msg.Commit(A, "1")])
def test_weights_that_fall_asleep_under_way_are_not_touched(worker: Worker, verb: msg.Verb) -> None:
    worker.ok(worker.begin(), worker.prepare(2))
    worker.session.asleep = {"weights"}
    worker.refused("EngineAsleep", verb)
    assert worker.holds(1)


def test_init(worker: Worker) -> None:
    worker.ok(msg.Init({}))
    worker.ok(msg.Init({"packed": True, "protocol": msg.PROTOCOL}))
    error = worker.refused("RequestError", msg.Init({"master_port": 5}))
    assert "master_port" in error["error"]
    assert worker.refused("RequestError", msg.Init({"protocol": 99}))["where"].startswith("$.proto")


def test_the_rank_is_named() -> None:
    worker = Worker(rank=5)
    assert worker.call(msg.Status()).rank == 5
    assert worker.refused("NoUpdate", msg.Apply(A))["where"] == "rank 5"


# ---- the lease ----------------------------------------------------------------------------


def test_a_silent_trainer_loses_its_update(worker: Worker, clock: Clock) -> None:
    worker.ok(worker.begin())
    clock.now += 59
    assert worker.state.phase == "UPDATING"
    clock.now += 2
    assert worker.state == msg.State("IDLE", "default")
    assert worker.ok(msg.Status()).info["ended"] == [A, "lease"]
    worker.refused("NoUpdate", msg.Commit(A, "1"))
    worker.push(2, B)
    assert worker.ok(msg.Status()).info["ended"] == [B, "commit"]


def test_every_call_of_the_trainer_renews_its_lease(worker: Worker, clock: Clock) -> None:
    worker.ok(worker.begin())
    for verb in (worker.prepare(2), msg.Apply(A), msg.Commit(A, "v2")):
        clock.now += 50
        worker.ok(verb)
    assert worker.holds(2)


def test_other_calls_do_not_renew_it(worker: Worker, clock: Clock) -> None:
    worker.ok(worker.begin())
    for _ in range(3):
        clock.now += 25
        worker.call(msg.Status())
        worker.call(worker.begin(B))
    assert worker.state.session != A


def test_a_lease_that_ends_after_the_first_byte(worker: Worker, clock: Clock) -> None:
    worker.ok(worker.begin(resume=True), worker.prepare(2), msg.Apply(A))
    clock.now += 61
    state = worker.state
    assert state.phase == "DIRTY"
    assert "lease of 60 s expired" in state.reason
    assert state.resume_after


def test_an_expired_update_makes_way_for_the_next(worker: Worker, clock: Clock) -> None:
    worker.ok(worker.begin())
    clock.now += 61
    worker.ok(worker.begin(B, "next"))
    assert worker.state.owner == "next"


# ---- abort, DIRTY, and back ---------------------------------------------------------------


@pytest.mark.parametrize("phase", ["begun", "prepared"])
@pytest.mark.parametrize("key", [A, ""])
def test_abort_before_the_first_byte(worker: Worker, phase: str, key: str) -> None:
    worker.ok(worker.begin(resume=True))
    if phase == "prepared":
        worker.ok(worker.prepare(2))
    reply = worker.ok(msg.Abort(key, "enough"))
    assert reply.state == msg.State("IDLE", "default")
    assert worker.holds(1)
    assert worker.ok(msg.Status()).info["ended"] == [A, "abort"]


def test_abort_after_the_first_byte(worker: Worker) -> None:
    worker.ok(worker.begin(owner="me"), worker.prepare(2), msg.Apply(A))
    state = worker.ok(msg.Abort(A, "enough")).state
    assert state.phase == "DIRTY"
    assert state.reason == "update of me failed: enough"
    assert state.version == "default"
    assert abs(state.since - time.time()) < 5


def test_abort_of_nothing(worker: Worker) -> None:
    assert worker.ok(msg.Abort("", "")).state.phase == "IDLE"
    worker.push(2)
    assert worker.ok(msg.Abort(A, "too late")).state == msg.State("IDLE", "v2")


def test_an_abort_that_comes_first_holds(worker: Worker) -> None:
    worker.ok(msg.Abort(A, "off", early=True))
    assert "aborted before it began" in str(worker.call(worker.begin()).error)
    assert worker.ok(msg.Status()).state.phase == "IDLE"
    worker.ok(worker.begin())  # it was told
    worker.ok(msg.Abort(A, "off", early=True))
    worker.ok(msg.Abort(A, "off", early=True))  # of one that is over: nothing to keep in mind
    worker.push(2)


def break_copies(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed module's hook fails: after the first byte, before the last."""

    def breaks(self: Any, layer: Any) -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(toys.PackEmpty, "process_weights_after_loading", breaks)


def test_a_copy_that_fails_is_dirty_and_a_complete_push_heals(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.push(2)
    worker.ok(worker.begin(B, resume=True), worker.prepare(3, B))
    with monkeypatch.context() as m:
        break_copies(worker, m)
        error = worker.refused("TransferError", msg.Apply(B))
    assert "no memory left" in error["error"]
    state = worker.state
    assert (state.phase, state.version, state.resume_after) == ("DIRTY", "v2", True)
    assert "no memory left" in state.reason
    assert not worker.holds(2)
    assert not worker.holds(3)
    # While it heals, the old reason stands and nothing is IDLE.
    begun = worker.ok(worker.begin(C), worker.prepare(3, C))
    assert (begun.state.phase, begun.state.reason) == ("UPDATING", state.reason)
    assert begun.state.resume_after
    done = worker.ok(msg.Apply(C), msg.Commit(C, "v3"))
    assert done.info["resume"] is True
    assert done.state == msg.State("IDLE", "v3")
    assert worker.holds(3)
    worker.ok(worker.begin(A))
    assert not worker.state.resume_after  # that was once


def test_dirty_survives_everything_but_a_complete_push(worker: Worker, clock: Clock) -> None:
    worker.ok(msg.MarkDirty("a rank tore", True))
    worker.ok(worker.begin())
    worker.refused("NoUpdate", msg.Commit(A, "2"))  # nothing was written
    worker.ok(msg.Abort(A, "no"))
    assert worker.state.phase == "DIRTY"
    worker.ok(worker.begin(B))
    clock.now += 100
    assert worker.state.phase == "DIRTY"
    worker.ok(msg.Shutdown(), msg.SetVersion("9"))
    state = worker.state
    assert (state.phase, state.reason, state.resume_after) == ("DIRTY", "a rank tore", True)
    assert worker.push(2).info["resume"] is True
    assert worker.state.phase == "IDLE"


def test_marked_dirty_in_the_middle(worker: Worker) -> None:
    worker.ok(worker.begin(resume=True), worker.prepare(2))
    state = worker.ok(msg.MarkDirty("another rank failed")).state
    assert (state.phase, state.resume_after) == ("DIRTY", True)
    worker.refused("NoUpdate", msg.Apply(A))


def test_a_failed_update_that_did_not_pause_resumes_nothing_later(worker: Worker) -> None:
    worker.ok(worker.begin(resume=False), worker.prepare(2), msg.Apply(A), msg.Abort(A, ""))
    assert worker.push(2).info["resume"] is False


def test_after_commit_may_fail(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    worker.ok(worker.begin(), worker.prepare(2), msg.Apply(A))

    def breaks() -> None:
        raise RuntimeError("LoRA state could not be reset")

    monkeypatch.setattr(worker.session, "_after_commit", breaks)
    worker.refused("TransferError", msg.Commit(A, "v2"))
    assert worker.state.phase == "DIRTY"


def test_verbs_after_an_error_do_not_run(worker: Worker) -> None:
    worker.refused("NoUpdate", worker.begin(), msg.Apply(A), msg.SetVersion("9"))
    assert worker.state.phase == "UPDATING"
    assert worker.session.version == "default"


# ---- registrations ------------------------------------------------------------------------


def test_old_registrations_are_let_go(worker: Worker) -> None:
    ids = []
    for i in range(KEEP + 2):
        trainer = Trainer(2)
        reg = trainer.register()
        worker.trainers[100 + i] = trainer
        ids.append(reg.id)
        worker.ok(worker.begin(), msg.Prepare(A, reg.id, reg, True), msg.Abort(A, ""))
    assert worker.ok(msg.Status()).info["registrations"] == ids[2:]
    assert list(worker.importer._opened) == ids[2:]
    worker.ok(worker.begin())
    worker.refused("UnknownRegistration", msg.Prepare(A, ids[0], None, True))


def test_a_replaced_registration_is_let_go_at_once(worker: Worker) -> None:
    first, second = worker.trainer(2).register(), worker.trainer(3).register()
    worker.ok(worker.begin(), msg.Prepare(A, first.id, first, True), msg.Abort(A, ""))
    for replaced in (first.id, second.id):  # its own id is no other's
        prepare = msg.Prepare(A, second.id, second, True, replaces=replaced)
        worker.ok(worker.begin(), prepare, msg.Abort(A, ""))
        assert list(worker.importer._opened) == [second.id]


def test_used_ones_are_kept(worker: Worker) -> None:
    first = worker.trainer(2).register()
    worker.ok(worker.begin(), msg.Prepare(A, first.id, first, True), msg.Abort(A, ""))
    for i in range(2 * KEEP):
        trainer = worker.trainers[100 + i] = Trainer(2)
        reg = trainer.register()
        worker.ok(worker.begin(), msg.Prepare(A, reg.id, reg, True))
        worker.ok(msg.Prepare(A, first.id, None, True), msg.Abort(A, ""))
    assert first.id in worker.ok(msg.Status()).info["registrations"]


def test_plans_of_equal_names_are_made_once(worker: Worker) -> None:
    worker.push(2)
    again = Trainer(3)
    reg = again.register()
    reply = worker.ok(worker.begin(B), msg.Prepare(B, reg.id, reg, True))
    assert len(worker.session.known._plans) == 1
    assert reply.report is not None


def test_shutdown_closes_every_mapping(worker: Worker) -> None:
    worker.push(2)
    worker.ok(msg.Shutdown())
    assert worker.ok(msg.Status()).info["registrations"] == []
    assert not worker.importer._opened
    assert worker.holds(2)
    worker.push(3)
    assert worker.holds(3)


@pytest.mark.parametrize("how", ["plan", "tied"])
def test_what_is_refused_is_not_kept_mapped(how: str) -> None:
    worker = Worker(toys.Retied) if how == "tied" else Worker()
    for i in range(3 * KEEP):
        trainer = worker.trainers[100 + i] = Trainer(2, worker.kind)
        if how == "tied":
            trainer.tensors["lm_head.weight"] = trainer.tensors["embed.weight"] + 1
        else:
            del trainer.tensors["mla.other.weight"]
        reg = trainer.register()
        worker.refused("PlanError", worker.begin(), msg.Prepare(A, reg.id, reg, True))
        worker.ok(msg.Abort(A, ""))
    assert len(worker.importer._opened) <= KEEP


# ---- updates in parts that nobody announced -----------------------------------------------


def parts(names: list[str], size: int) -> Iterator[list[str]]:
    for i in range(0, len(names), size):
        yield names[i : i + size]


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("reverse", [False, True])
def test_parts(worker: Worker, size: int, reverse: bool) -> None:
    """Each part's memory is used again at once; order does not matter."""
    names = sorted(toys.checkpoint(Model(), 2), reverse=reverse)
    worker.ok(worker.begin())
    for chosen in parts(names, size):
        trainer = worker.trainers[2] = Trainer(2)
        worker.ok(worker.prepare(2, A, *chosen), msg.Apply(A))
        for t in trainer.tensors.values():
            t.view(torch.uint8).fill_(0xAA)
        trainer.exporter.close()
    assert worker.state.wrote
    done = worker.ok(msg.Commit(A, "v2"))
    assert done.state == msg.State("IDLE", "v2")
    assert worker.holds(2)
    assert worker.ok(msg.Status()).info["registrations"] == []
    assert not worker.importer._opened


def test_parts_of_what_was_pushed_before_need_no_plan_of_their_own(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part for each name, again and again: a plan takes as long as a push."""
    names = sorted(toys.checkpoint(Model(), 2))
    built = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        built.append(args)
        return build(*args, **kwargs)

    build = known.build
    monkeypatch.setattr(known, "build", counted)
    for seed in (2, 3, 2):
        built.clear()
        worker.ok(worker.begin())
        for name in names:
            worker.ok(worker.prepare(seed, A, name), msg.Apply(A))
        worker.ok(msg.Commit(A, f"v{seed}"))
        assert worker.holds(seed)
    assert built == []


class RetiedPacked(toys.Retied):
    """The head is computed from what it shares with the embedding."""

    def make(self) -> None:
        super().make()
        self.lm_head.quant_method = toys.PackKeep()


@pytest.mark.parametrize("kind", ["in_place", "processed"])
@pytest.mark.parametrize("first", ["embed.weight", "lm_head.weight"])
def test_tied_names_in_different_parts_must_bring_the_same(kind: str, first: str) -> None:
    """The later one would win in silence."""
    worker = Worker(toys.Retied if kind == "in_place" else RetiedPacked)
    tensors = worker.trainer(2).tensors
    second = "lm_head.weight" if first == "embed.weight" else "embed.weight"
    rest = [n for n in tensors if n not in (first, second)]
    tensors[second] = tensors[first] + 1
    worker.ok(worker.begin(), worker.prepare(2, A, first), msg.Apply(A))
    if kind == "in_place":
        error = worker.refused("PlanError", worker.prepare(2, A, second))
    else:  # held, until all of them are there
        worker.ok(worker.prepare(2, A, second, *rest), msg.Apply(A))
        error = worker.refused("PlanError", msg.Commit(A, "v2"))
    assert "are one tensor" in error["error"]
    assert worker.state.phase == "DIRTY"
    tensors[second].copy_(tensors[first])
    worker.ok(worker.begin(B))
    for names in (first, *rest), (second,):
        worker.ok(worker.prepare(2, B, *names), msg.Apply(B))
    worker.ok(msg.Commit(B, "v2"))
    assert worker.holds(2)


def test_parts_that_do_not_cover_the_model_are_dirty(worker: Worker) -> None:
    worker.ok(worker.begin(), worker.prepare(2, A, "mla.other.weight"), msg.Apply(A))
    error = worker.refused("PlanError", msg.Commit(A, "v2"))
    assert "no name covers" in error["error"]
    assert worker.state.phase == "DIRTY"
    worker.push(2, B)
    assert worker.holds(2)


def alone(worker: Worker, seed: int, *names: str) -> msg.Reply:
    """An update of these names only."""
    worker.ok(worker.begin(), worker.prepare(seed, A, *names))
    return worker.call(msg.Apply(A), msg.Commit(A, f"v{seed}"))


class FusedPacked(toys.Fused):
    """Computes from q, k and v together, as vLLM's packed linear layers do."""

    def make(self) -> None:
        super().make()
        for layer in self.layers:
            layer.qkv.quant_method = toys.PackKeep()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer.qkv.quant_method.apply(layer.qkv, x) for layer in self.layers])


def one_by_one(workers: list[Worker], seed: int) -> set[str]:
    """Each tensor in an update of its own, by vLLM's calls; those that were refused."""

    def perform(action: exchange.Action) -> Any:
        match action:
            case exchange.Call():
                return [w.call(*action.verbs) for w in workers]
            case exchange.IsPaused():
                return False

    def update(*names: str) -> None:
        exchange.run(exchange.start(msg.StartBody("me")), perform)
        session = workers[0].state.session
        trainer = workers[0].trainer(seed)
        reg = trainer.register(*names)
        for w in workers:
            w.trainers[seed] = trainer
            w.ok(msg.Prepare(session, reg.id, reg, False), msg.Apply(session))
        exchange.run(exchange.finish(msg.FinishBody(f"v{seed}")), perform)

    refused = set()
    for name in workers[0].trainer(seed).tensors:
        try:
            update(name)
        except PlanError:
            refused.add(name)
        assert {w.state.phase for w in workers} == {"IDLE"}
    if refused:
        update(*refused)
    return refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "together"),
    [(FusedPacked, {"q_proj", "k_proj", "v_proj"}), (toys.Retied, {"embed", "lm_head"})],
)
def test_an_engine_that_takes_some_of_its_weights(
    kind: type[toys.Toy], together: set[str], dtype: torch.dtype
) -> None:
    """As TRL's online DPO sends them. What makes one tensor comes together, and is refused before
    a byte is written if it does not; in whatever floats."""
    worker = Worker(kind)
    worker.session.known.partial = True
    trainer = worker.trainer(2)
    trainer.tensors = {n: t.to(dtype) for n, t in trainer.tensors.items()}
    refused = one_by_one([worker], 2)
    assert {n.split(".")[-2] for n in refused} == together
    assert len(worker.session.known._plans) == 1  # of the engine's own checkpoint
    want = toys.ToyHost(kind())
    want.first_load([(n, t.clone()) for n, t in trainer.tensors.items()])
    a, b = toys.live_tensors(worker.host.model), toys.live_tensors(want.model)
    assert [n for n in b if not same_bits(a[n], b[n])] == []


def test_ranks_agree_before_some_weights_are_committed() -> None:
    """A group that one rank alone holds: where it is refused there, no other has taken it."""
    workers = [Worker(FusedPacked, rank=r) for r in range(2)]
    for w in workers:
        w.session.known.partial = True
    other = workers[1].session.known

    def nothing_missing(open_: Any, *, mixed: bool) -> Any:
        return other.part(tuple(open_.parts.values()))

    other.parts = nothing_missing  # type: ignore[method-assign]
    refused = one_by_one(workers, 2)
    assert len(refused) == 12


def test_some_weights_do_not_heal_a_dirty_engine(worker: Worker) -> None:
    worker.session.known.partial = True
    worker.ok(msg.MarkDirty("mixed"))
    reply = alone(worker, 2, "mla.other.weight")
    assert reply.error is not None
    assert "no name covers" in reply.error["error"]
    assert worker.state.phase == "DIRTY"
    worker.push(2, B)
    assert worker.holds(2)


def test_a_part_that_is_refused_before_the_first_byte(worker: Worker) -> None:
    worker.ok(worker.begin())
    trainer = worker.trainer(2)
    trainer.tensors["mla.other.weight"] = torch.zeros(3, 3)
    worker.refused("PlanError", worker.prepare(2, A, "mla.other.weight"))
    assert worker.state.phase == "UPDATING"
    worker.ok(msg.Abort(A, ""))
    assert worker.holds(1)


def test_a_refused_part_after_another_is_dirty(worker: Worker) -> None:
    """vLLM's own lifecycle has no abort: the error itself must end what is half done."""
    worker.ok(worker.begin(), worker.prepare(2, A, "mla.other.weight"), msg.Apply(A))
    worker.trainer(2).tensors["mla.kv_b_proj.weight"] = torch.zeros(3, 3)
    worker.refused("PlanError", worker.prepare(2, A, "mla.kv_b_proj.weight"))
    assert worker.state.phase == "DIRTY"


@pytest.mark.parametrize("first", ["parts", "at once"])
def test_one_update_comes_one_way(worker: Worker, first: str) -> None:
    """A complete push of 3 amid parts of 2 would leave both in the model."""
    part, whole = worker.prepare(2, A, *NAMES), worker.prepare(3)
    ways = (part, whole) if first == "parts" else (whole, part)
    worker.ok(worker.begin(), ways[0], msg.Apply(A))
    worker.refused("RequestError", ways[1], msg.Apply(A))
    assert worker.state.phase == "DIRTY"


def test_finishing_without_anything_written(worker: Worker) -> None:
    worker.ok(worker.begin(), msg.Commit(A, "named"))
    assert worker.state == msg.State("IDLE", "named")
    assert worker.holds(1)


# ---- packed updates -----------------------------------------------------------------------

SIZE = 1024


class Packed(Trainer):
    """Two buffers, filled in turn."""

    def __init__(self, seed: int, kind: type[toys.Toy] = Model) -> None:
        super().__init__(seed, kind)
        self.memory = [torch.empty(SIZE, dtype=torch.uint8) for _ in range(2)]
        self.exporters = [MemoryExporter() for _ in self.memory]
        self.buckets = cut(specs_of(self.tensors), SIZE)
        self.announcement = msg.Announcement(
            C, specs_of(self.tensors), SIZE,
            tuple(
                e.register([("b", m)])[0]
                for e, m in zip(self.exporters, self.memory, strict=True)
            ),
        )  # fmt: skip

    def fill(self, index: int, seed: int) -> None:
        buffer = self.memory[index % 2]
        buffer.fill_(0xAA)
        self.fill_with(index, toys.checkpoint(Model(), seed))

    def fill_with(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        buffer = self.memory[index % 2]
        for p in self.buckets[index]:
            t = tensors[p.spec.name]
            place = buffer[p.offset : p.offset + p.nbytes].view(t.dtype).view(p.shape)
            place.copy_(t[p.row : p.row + p.rows] if t.dim() else t)


def test_packed_pushes_use_their_buffers_again(worker: Worker) -> None:
    trainer = Packed(2)
    for i, seed in enumerate((2, 3, 1)):
        announce = None if i else trainer.announcement
        reply = worker.ok(worker.begin(), msg.Announce(A, C, announce))
        assert (reply.report is None) == bool(i)
        for index in range(len(trainer.buckets)):
            trainer.fill(index, seed)
            worker.ok(msg.Bucket(A, index))
        worker.ok(msg.Commit(A, f"v{seed}"))
        assert worker.holds(seed)


@pytest.mark.parametrize("kind", [toys.Retied, RetiedPacked])
@pytest.mark.parametrize("late", ["embed.weight", "lm_head.weight"])
def test_tied_names_in_buckets_must_bring_the_same(kind: type[toys.Toy], late: str) -> None:
    worker, trainer = Worker(kind), Packed(2, kind)
    wrong = trainer.tensors | {late: trainer.tensors[late] + 1}
    for key, tensors in ((A, wrong), (B, trainer.tensors), (C, trainer.tensors)):
        announce = trainer.announcement if key == A else None
        worker.ok(worker.begin(key), msg.Announce(key, C, announce))
        for index in range(len(trainer.buckets)):
            trainer.fill_with(index, tensors)
            worker.ok(msg.Bucket(key, index))
        if tensors is wrong:
            error = worker.refused("PlanError", msg.Commit(key, "v2"))
            assert "are one tensor" in error["error"]
            assert worker.state.phase == "DIRTY"
        else:
            worker.ok(msg.Commit(key, "v2"))
            assert worker.holds(2)


def test_buckets_come_in_order_and_all_of_them(worker: Worker) -> None:
    trainer = Packed(2)
    worker.ok(worker.begin(), msg.Announce(A, C, trainer.announcement))
    assert "0 was expected" in worker.refused("RequestError", msg.Bucket(A, 1))["error"]
    assert worker.state.phase == "UPDATING"
    worker.refused("RequestError", msg.Bucket(A, -1))
    trainer.fill(0, 2)
    worker.ok(msg.Bucket(A, 0))
    error = worker.refused("RequestError", msg.Commit(A, "v2"))
    assert "buckets never came" in error["error"]
    assert worker.state.phase == "DIRTY"


def test_a_bucket_too_many(worker: Worker) -> None:
    trainer = Packed(2)
    worker.ok(worker.begin(), msg.Announce(A, C, trainer.announcement))
    for index in range(len(trainer.buckets)):
        trainer.fill(index, 2)
        worker.ok(msg.Bucket(A, index))
    worker.refused("RequestError", msg.Bucket(A, len(trainer.buckets)))


def test_an_unknown_announcement_is_asked_for(worker: Worker) -> None:
    worker.ok(worker.begin())
    worker.refused("UnknownRegistration", msg.Announce(A, C, None))
    other = msgspec.structs.replace(Packed(2).announcement, id=B)
    worker.refused("UnknownRegistration", msg.Announce(A, C, other))


def test_a_buffer_that_is_not_what_was_announced(worker: Worker) -> None:
    trainer = Packed(2)
    small = msgspec.structs.replace(trainer.announcement, buffer_bytes=SIZE // 2)
    worker.refused("HandleError", worker.begin(), msg.Announce(A, C, small))
    assert not worker.importer._opened


# ---- never raises -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        None,
        "[]",
        [],
        {},
        5,
        object(),
        bytearray(b"\x90"),
        b"",
        b"\xc1",
        b"\xff" * 9,
        b"\x91" * 5000,
    ],
    ids=lambda p: repr(p)[:20],
)
def test_garbage(worker: Worker, payload: object) -> None:
    worker.ok(worker.begin())
    reply = msgspec.convert(worker.session.call(payload), msg.Reply)
    assert reply.error is not None
    assert reply.error["code"] == "RequestError"
    assert reply.state.session == A


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(), st.none(), st.lists(st.integers())))
def test_random_garbage(payload: object) -> None:
    reply = msgspec.convert(_shared.session.call(payload), msg.Reply)
    assert reply.state.phase == "IDLE"
    assert (reply.error is None) == (payload == b"\x90")


_shared = Worker(toys.Skips)


def test_a_host_that_cannot_be_made(worker: Worker) -> None:
    def breaks() -> ToyHost:
        raise MemoryError

    worker.session.known._make_host = breaks
    worker.refused("TransferError", worker.begin(), worker.prepare(2))
    assert worker.logged


# ---- any order of anything ----------------------------------------------------------------

NAMES = sorted(toys.checkpoint(Model(), 1))
KEYS = st.sampled_from([A, B, ""])
STEPS = st.one_of(
    st.tuples(st.just("begin"), KEYS),
    st.tuples(st.just("push"), st.sampled_from([2, 3])),
    st.tuples(st.just("prepare"), KEYS, st.sampled_from([2, 3])),
    st.tuples(st.just("part"), st.sampled_from([2, 3]), st.sampled_from([1, 4, len(NAMES)])),
    st.tuples(st.just("apply"), KEYS),
    st.tuples(st.just("commit"), KEYS),
    st.tuples(st.just("abort"), KEYS),
    st.tuples(st.just("break")),
    st.tuples(st.just("silence")),
    st.tuples(st.just("garbage")),
    st.tuples(st.just("dirty")),
    st.tuples(st.just("shutdown")),
)
BITS = {seed: toys.live_tensors(fresh(Model, seed).model) for seed in (1, 2, 3)}


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(STEPS, min_size=3, max_size=14))
def test_idle_means_whole_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[Any, ...]]
) -> None:
    with monkeypatch.context() as m:
        clock = Clock()
        m.setattr(module, "time", clock)
        worker = Worker()
        for step in steps:
            _take(worker, clock, m, step)
            _check(worker)


def _take(worker: Worker, clock: Clock, m: pytest.MonkeyPatch, step: tuple[Any, ...]) -> None:
    match step:
        case ("begin", key):
            worker.call(worker.begin(key or C))
        case ("push", seed):
            worker.call(worker.begin(C), worker.prepare(seed, C))
            worker.call(msg.Apply(C), msg.Commit(C, str(seed)))
        case ("prepare", key, seed):
            worker.call(worker.prepare(seed, key))
        case ("part", seed, size):
            for names in parts(NAMES, size):
                worker.call(worker.prepare(seed, "", *names), msg.Apply(""))
        case ("apply", key):
            worker.call(msg.Apply(key))
        case ("commit", key):
            worker.call(msg.Commit(key, None))
        case ("abort", key):
            worker.call(msg.Abort(key, "so"))
        case ("break",):
            with m.context() as inner:
                break_copies(worker, inner)
                worker.call(msg.Apply(""))
        case ("silence",):
            clock.now += 61
        case ("garbage",):
            worker.session.call("garbage")
        case ("dirty",):
            worker.call(msg.MarkDirty("told so"))
        case ("shutdown",):
            worker.call(msg.Shutdown())


def _check(worker: Worker) -> None:
    state = worker.state
    live = toys.live_tensors(worker.host.model)
    whole = [
        seed
        for seed, bits in BITS.items()
        if live.keys() == bits.keys() and all(same_bits(live[n], t) for n, t in bits.items())
    ]
    if state.phase == "IDLE" or (state.phase == "UPDATING" and not state.wrote):
        assert whole or state.reason, f"{state.phase} with mixed weights"
    if state.phase == "DIRTY":
        assert state.reason
