"""The order of an update and what undoes it: the generators of `wire/exchange.py`, without I/O.

`Engine` performs actions on simulated ranks and writes a log; a test says what fails, and reads
the log. The ranks follow the state machine of `worker/session.py` (tested in test_session.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from vllm_wt_plugin.errors import (
    NoUpdate,
    PlanError,
    TransferError,
    UpdateInProgress,
    WeightSyncError,
)
from vllm_wt_plugin.wire import broadcast, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.wire.handles import Registration, ShmStorage, TensorRef
from vllm_wt_plugin.wire.nccl import Progress, ReceivePatches
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.update import UpdateInfo

KEY = "0123456789abcdef" * 2
REGISTRATION = Registration(
    KEY, (ShmStorage(f"/wt_{KEY}", 64),), (TensorRef("w", "float32", (4, 4), 0, 0),)
)
PUSH = msg.PushRequest(KEY, REGISTRATION, version="7", owner="me")


@dataclass
class Rank:
    """One worker. `fail`: verb → error; a verb that writes and fails leaves it DIRTY."""

    index: int
    fail: dict[str, WeightSyncError] = field(default_factory=dict)
    version: str = "1"
    open: str | None = None
    owner: str = ""
    resume_after: bool = False
    sticky: bool = False
    wrote: bool = False
    dirty: str = ""
    looks: int = 1  # until a broadcast is here
    asleep: tuple[str, ...] = ()
    report: msg.PlanReport | None = field(default_factory=msg.PlanReport)
    seconds: dict[str, float] = field(default_factory=dict)

    def call(self, verbs: tuple[msg.Verb, ...]) -> msg.Reply:
        error, report, info = None, None, {}
        for verb in verbs:
            tag = verb.__struct_config__.tag
            try:
                report, more = self.run(verb, str(tag)) or (report, {})
                info |= more
            except WeightSyncError as exc:
                error = exc.to_dict()
                if self.open is not None and self.wrote:
                    self.end(f"{tag} failed")
                break
        return msg.Reply(self.index, self.state(), error, report, dict(self.seconds), info)

    def run(self, verb: msg.Verb, tag: str) -> tuple[Any, dict[str, Any]] | None:
        if tag in ("apply", "bucket"):
            self.wrote = True
        if tag in self.fail:
            raise self.fail[tag]
        match verb:
            case msg.Begin():
                if self.open is not None:
                    raise UpdateInProgress("another update is open")
                self.open, self.owner, self.wrote = verb.session, verb.owner, False
                self.resume_after = verb.resume_after or self.sticky
            case ReceivePatches():
                return None, {"receiving": True}
            case Progress():
                if verb.session != self.open:
                    raise NoUpdate("no such update is open")
                self.looks -= 1
                return None, {"receiving": self.looks > 0}
            case msg.PreparePatches():
                self.resume_after |= verb.pauses
            case msg.Prepare() | msg.Announce() | msg.Apply() | msg.Bucket() | msg.Commit():
                if self.open is None or verb.session not in ("", self.open):
                    raise NoUpdate("no such update is open")
                if isinstance(verb, msg.Prepare | msg.Announce):
                    return self.report, {}
                if isinstance(verb, msg.Apply):
                    return None, {"sums": {}}
                if isinstance(verb, msg.Commit):
                    self.open, self.wrote, self.dirty, self.sticky = None, False, "", False
                    self.version = verb.version or self.version
                    return None, {"resume": self.resume_after}
            case msg.Abort():
                if self.open is not None and verb.session in ("", self.open):
                    self.end(verb.reason)
            case msg.MarkDirty():
                if self.open is not None:
                    self.sticky, self.open = self.resume_after, None
                self.dirty, self.sticky = verb.reason, self.sticky or verb.resume_after
        return None

    def end(self, reason: str) -> None:
        self.dirty = f"failed: {reason}" if self.wrote else self.dirty
        self.sticky = self.resume_after if self.dirty else self.sticky
        self.open, self.wrote = None, False

    def state(self) -> msg.State:
        phase: Any = "UPDATING" if self.open else "DIRTY" if self.dirty else "IDLE"
        resume = self.resume_after if self.open else self.sticky
        return msg.State(
            phase, self.version, self.dirty, self.owner, self.open or "",
            resume_after=resume, wrote=self.wrote, asleep=self.asleep,
        )  # fmt: skip


class Engine:
    """Performs actions; `fail` names actions that raise."""

    def __init__(self, ranks: int = 2, *, paused: bool = False, fail: str = "") -> None:
        self.ranks = [Rank(i) for i in range(ranks)]
        self.paused, self.fail = paused, fail
        self.log: list[str] = []
        self.verbs: list[msg.Verb] = []

    def perform(self, action: exchange.Action) -> Any:
        name = type(action).__name__
        if isinstance(action, exchange.Call):
            name = " ".join(str(v.__struct_config__.tag) for v in action.verbs)
            self.verbs += action.verbs
        self.log.append(name)
        if name == self.fail:
            raise ConnectionError(f"{name} broke")
        match action:
            case exchange.Call():
                return [r.call(action.verbs) for r in self.ranks]
            case exchange.IsPaused():
                return self.paused
            case exchange.Pause():
                self.paused = True
            case exchange.Resume():
                assert all(r.state().phase == "IDLE" for r in self.ranks), "resumed too early"
                self.paused = False
        return None

    def run(self, steps: exchange.Steps) -> exchange.Outcome:
        return exchange.run(steps, self.perform)

    def fails(self, steps: exchange.Steps, error: type[Exception]) -> Exception:
        with pytest.raises(error) as caught:
            self.run(steps)
        return caught.value

    def one(self, kind: type[Any]) -> Any:
        (found,) = [v for v in self.verbs if isinstance(v, kind)]
        return found

    @property
    def phases(self) -> list[str]:
        return [r.state().phase for r in self.ranks]


BROKEN = TransferError("the copy broke")
READY = ["IsPaused", "begin prepare", "Pause"]


# ---- one whole push -----------------------------------------------------------------------


def test_the_order_of_a_push() -> None:
    engine = Engine()
    outcome = engine.run(exchange.push(PUSH))
    published = ["apply commit", "ResetCaches", "SetVersion", "Resume"]
    assert engine.log == [*READY, *published]
    assert outcome.version == "7"
    assert outcome.report == msg.PlanReport()
    assert not engine.paused
    begin = engine.one(msg.Begin)
    assert (begin.owner, begin.resume_after) == ("me", True)
    sessions = {v.session for v in engine.verbs}
    assert len(sessions) == 1
    assert len(sessions.pop()) == 32
    prepare = engine.one(msg.Prepare)
    assert prepare == msg.Prepare(begin.session, KEY, REGISTRATION, True)


def by_broadcast() -> PatchPush:
    """Changes that come by broadcast."""
    push = PatchPush(["w"], ["float32"], [(4, 4)], [1], KEY, "1", version="7", form="broadcast")
    found = broadcast.checked(push)
    assert isinstance(found, PatchPush)
    return found


def patches(engine: Engine, between: Callable[[], None] = lambda: None) -> exchange.Outcome:
    """They come; `between` their beginning and their arrival."""
    push = by_broadcast()
    begun = exchange.begin(push, ReceivePatches(push.session, push))
    assert engine.run(begun).session == push.session
    between()
    return engine.run(broadcast.go_on(push))


BEGUN = ["begin receive_patches"]
WRITTEN = ["apply commit", "ResetCaches", "SetVersion"]


def test_patches_arrive_before_the_pause() -> None:
    engine = Engine()
    assert patches(engine).version == "7"
    ready = ["progress", "IsPaused", "prepare_patches", "Pause"]
    assert engine.log == [*BEGUN, *ready, *WRITTEN, "Resume"]
    assert len({v.session for v in engine.verbs}) == 1
    engine = Engine()
    for r in engine.ranks:
        r.looks = 3
    assert patches(engine).session  # it is open yet
    assert engine.log == [*BEGUN, "progress"]


def test_patches_leave_a_paused_engine_paused() -> None:
    engine = Engine(paused=True)
    patches(engine)
    assert engine.log == [*BEGUN, "progress", "IsPaused", "prepare_patches", *WRITTEN]
    assert engine.paused


@pytest.mark.parametrize("paused", [False, True])
def test_who_pauses_or_resumes_while_patches_arrive_is_heeded(paused: bool) -> None:
    engine = Engine(paused=not paused)
    patches(engine, lambda: setattr(engine, "paused", paused))
    assert engine.log[-5:] == (
        ["IsPaused", "prepare_patches", *WRITTEN] if paused else ["Pause", *WRITTEN, "Resume"]
    )
    assert engine.paused is paused


@pytest.mark.parametrize("verb", ["progress", "prepare_patches"])
def test_patches_that_do_not_arrive_leave_a_pause_as_it_is(verb: str) -> None:
    engine = Engine()
    engine.ranks[1].fail = {verb: BROKEN}
    with pytest.raises(TransferError, match="the copy broke"):
        patches(engine, lambda: setattr(engine, "paused", True))
    assert "Resume" not in engine.log
    assert engine.paused
    assert engine.phases == ["IDLE", "IDLE"]


def test_an_abort_while_patches_arrive_leaves_a_pause_as_it_is() -> None:
    engine = Engine()

    def abort() -> None:
        engine.paused = True
        engine.run(exchange.abort(msg.AbortBody("enough")))

    with pytest.raises(TransferError):
        patches(engine, abort)
    assert engine.paused
    assert engine.phases == ["IDLE", "IDLE"]


def test_an_engine_that_cannot_be_asked_once_patches_are_here() -> None:
    engine = Engine(fail="IsPaused")
    engine.fails(broadcast.push(by_broadcast()), ConnectionError)
    assert engine.log[-1] == "abort"
    assert engine.phases == ["IDLE", "IDLE"]


def test_patches_that_fail_while_written_resume_what_they_paused() -> None:
    engine = Engine()
    engine.ranks[0].fail = {"commit": BROKEN}
    with pytest.raises(TransferError):
        patches(engine)
    assert engine.phases == ["DIRTY", "DIRTY"]
    assert all(r.sticky for r in engine.ranks)  # by whoever heals it


def test_two_pushes_are_two_sessions() -> None:
    engine = Engine()
    for _ in range(2):
        engine.run(exchange.push(PUSH))
    assert len({v.session for v in engine.verbs if isinstance(v, msg.Begin)}) == 2


def test_a_push_leaves_a_paused_engine_paused() -> None:
    engine = Engine(paused=True)
    engine.run(exchange.push(PUSH))
    assert engine.log == ["IsPaused", "begin prepare", "apply commit", "ResetCaches", "SetVersion"]
    assert engine.paused


def test_a_push_without_a_version_keeps_the_workers() -> None:
    assert Engine().run(exchange.push(msg.PushRequest(KEY))).version == "1"


def test_the_slowest_rank_counts() -> None:
    engine = Engine()
    engine.ranks[0].seconds, engine.ranks[1].seconds = {"copy": 1.0, "plan": 5.0}, {"copy": 2.0}
    seconds = engine.run(exchange.push(PUSH)).seconds
    assert (seconds["copy"], seconds["plan"]) == (2.0, 5.0)
    assert {"pause", "resume", "call", "resetcaches"} <= seconds.keys()


def test_no_resume_while_the_kv_cache_sleeps() -> None:
    engine = Engine()
    engine.ranks[1].asleep = ("kv_cache",)
    engine.run(exchange.push(PUSH))
    assert "Resume" not in engine.log
    assert engine.phases == ["IDLE", "IDLE"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refused_preparation_writes_nothing_and_goes_on(rank: int) -> None:
    engine = Engine()
    engine.ranks[rank].fail["prepare"] = PlanError("no such name", where="w")
    error = engine.fails(exchange.push(PUSH), PlanError)
    assert "no such name" in str(error)
    assert engine.log == ["IsPaused", "begin prepare", "abort"]
    assert engine.phases == ["IDLE", "IDLE"]
    assert engine.one(msg.Abort).session == engine.one(msg.Begin).session


def test_names_that_only_all_ranks_know_to_be_wrong_write_nothing() -> None:
    engine = Engine()
    for r in engine.ranks:
        r.report = msg.PlanReport(nowhere=["x"])
    engine.fails(exchange.push(PUSH), PlanError)
    assert engine.log == ["IsPaused", "begin prepare", "abort"]


def test_a_second_trainer_is_refused_and_disturbs_nothing() -> None:
    engine = Engine(paused=False)
    engine.run(exchange.start(msg.StartBody(owner="first")))
    engine.paused = False  # as another API process would see it
    before = [(r.open, r.owner, r.resume_after) for r in engine.ranks]
    engine.log.clear()
    engine.fails(exchange.push(PUSH), UpdateInProgress)
    assert engine.log == ["IsPaused", "begin prepare", "abort"]
    assert [(r.open, r.owner, r.resume_after) for r in engine.ranks] == before


def test_a_second_trainer_does_not_resume_between_the_firsts_parts() -> None:
    engine = Engine()
    engine.run(exchange.start(msg.StartBody()))
    engine.log.clear()
    engine.fails(exchange.start(msg.StartBody()), UpdateInProgress)
    assert "Resume" not in engine.log
    assert engine.paused


def test_a_pause_that_fails_is_undone() -> None:
    engine = Engine(fail="Pause")
    engine.fails(exchange.push(PUSH), ConnectionError)
    assert engine.log == [*READY, "abort", "Resume"]
    assert engine.phases == ["IDLE", "IDLE"]


def test_a_failed_undo_of_a_paused_engine_does_not_resume_it() -> None:
    engine = Engine(paused=True)
    engine.ranks[0].fail["prepare"] = BROKEN
    engine.fails(exchange.push(PUSH), TransferError)
    assert "Resume" not in engine.log
    assert engine.paused


def test_no_resume_of_a_sleeping_engine_after_a_failure() -> None:
    engine = Engine()
    engine.ranks[0].fail["prepare"] = BROKEN
    engine.ranks[1].asleep = ("kv_cache",)
    engine.fails(exchange.push(PUSH), TransferError)
    assert engine.log == ["IsPaused", "begin prepare", "abort"]


def test_a_copy_that_fails_everywhere_is_dirty_and_stays_paused() -> None:
    engine = Engine()
    for r in engine.ranks:
        r.fail["apply"] = BROKEN
    error = engine.fails(exchange.push(PUSH), TransferError)
    assert "(and 1 more of 2 ranks)" in error.where  # type: ignore[attr-defined]
    assert engine.log == [*READY, "apply commit", "abort"]
    assert engine.phases == ["DIRTY", "DIRTY"]
    assert engine.paused


@pytest.mark.parametrize("torn", [[0], [1], [0, 2]])
@pytest.mark.parametrize("verb", ["apply", "commit"])
def test_ranks_that_part_are_all_marked_dirty(torn: list[int], verb: str) -> None:
    engine = Engine(ranks=3)
    for i in torn:
        engine.ranks[i].fail[verb] = BROKEN
    engine.fails(exchange.push(PUSH), TransferError)
    assert engine.log == [*READY, "apply commit", "abort", "mark_dirty"]
    assert engine.phases == ["DIRTY"] * 3
    assert engine.one(msg.MarkDirty).resume_after
    assert "failed" in engine.one(msg.MarkDirty).reason


def test_a_torn_healing_push_passes_on_who_paused() -> None:
    """The rank that committed has forgotten that a failed update paused the engine."""
    engine = Engine(paused=True)
    for r in engine.ranks:
        r.dirty, r.sticky = "half", True
    engine.ranks[1].fail["apply"] = BROKEN
    engine.fails(exchange.push(PUSH), TransferError)
    assert engine.one(msg.MarkDirty).resume_after
    assert [r.sticky for r in engine.ranks] == [True, True]


def test_a_rank_that_fails_before_it_writes_tears_the_others() -> None:
    """Its abort leaves it IDLE with old weights; the others have the new."""
    engine = Engine()
    engine.ranks[1].fail["apply"] = BROKEN
    run = engine.ranks[1].run

    def never_wrote(verb: msg.Verb, tag: str) -> Any:
        if tag == "apply":
            raise BROKEN
        return run(verb, tag)

    engine.ranks[1].run = never_wrote  # type: ignore[method-assign]
    engine.fails(exchange.push(PUSH), TransferError)
    assert engine.phases == ["DIRTY", "DIRTY"]
    assert "only some ranks took the update" in engine.one(msg.MarkDirty).reason


@pytest.mark.parametrize("action", ["ResetCaches", "SetVersion"])
def test_new_weights_with_old_caches_are_dirty(action: str) -> None:
    engine = Engine(fail=action)
    engine.fails(exchange.push(PUSH), ConnectionError)
    assert engine.log[-2:] == [action, "mark_dirty"]
    assert engine.phases == ["DIRTY", "DIRTY"]
    assert engine.paused
    assert engine.one(msg.MarkDirty).resume_after
    assert f"{action} broke" in engine.one(msg.MarkDirty).reason


@pytest.mark.parametrize("break_by", ["apply", "commit", "ResetCaches", "SetVersion"])
@pytest.mark.parametrize("paused", [False, True])
def test_the_push_that_heals_restores_the_pause_that_the_first_found(
    break_by: str, paused: bool
) -> None:
    engine = Engine(paused=paused, fail=break_by)
    if break_by in ("apply", "commit"):
        engine.ranks[0].fail[break_by] = BROKEN
    with pytest.raises((TransferError, ConnectionError)):
        engine.run(exchange.push(PUSH))
    assert engine.paused
    engine.fail = ""
    for r in engine.ranks:
        r.fail.clear()
    engine.run(exchange.push(PUSH))
    assert engine.phases == ["IDLE", "IDLE"]
    assert engine.paused is paused


@pytest.mark.parametrize("call", ["begin prepare", "apply commit"])
def test_a_call_that_breaks_is_followed_by_an_abort(call: str) -> None:
    engine = Engine(fail=call)
    engine.fails(exchange.push(PUSH), ConnectionError)
    assert "abort" in engine.log
    assert "SetVersion" not in engine.log


def test_an_engine_that_is_dead_for_the_abort_too() -> None:
    engine = Engine(fail="begin prepare")
    perform = engine.perform

    def dead(action: exchange.Action) -> Any:
        if engine.log:
            engine.log.append("dead")
            raise EOFError("no engine")
        return perform(action)

    with pytest.raises(EOFError):
        exchange.run(exchange.push(PUSH), dead)
    assert engine.log == ["IsPaused", "dead", "dead"]


# ---- an update of several calls -----------------------------------------------------------


def part(engine: Engine) -> exchange.Outcome:
    info = UpdateInfo(
        ["w"], ["float32"], [(4, 4)],
        storages=[ShmStorage(f"/wt_{KEY}", 64)], handles=[(0, 0, None)],
    )  # fmt: skip
    return engine.run(exchange.update(info))


def test_the_order_of_an_update_in_parts() -> None:
    engine = Engine()
    engine.run(exchange.start(msg.StartBody(owner="me", lease_s=5)))
    assert engine.log == ["IsPaused", "begin", "Pause", "WatchLease"]
    assert engine.one(msg.Begin).lease_s == 5
    engine.log.clear()
    part(engine)
    part(engine)
    assert engine.log == ["status", "prepare_part", "apply"] * 2
    keys = {v.registration for v in engine.verbs if isinstance(v, msg.PreparePart)}
    assert len(keys) == 2
    engine.log.clear()
    outcome = engine.run(exchange.finish(msg.FinishBody("9")))
    assert engine.log == ["status", "commit", "ResetCaches", "SetVersion", "Resume"]
    assert outcome.version == "9"
    assert not engine.paused


def test_a_packed_update_is_announced_with_its_start() -> None:
    engine = Engine()
    announce = msg.Announcement(KEY, (ParamSpec("w", "float32", (4,)),), 64, (REGISTRATION,))
    engine.ranks[0].report = engine.ranks[1].report = msg.PlanReport(tensors=1)
    outcome = engine.run(exchange.start(msg.StartBody(announced=KEY, announce=announce)))
    assert engine.log == ["IsPaused", "begin announce", "Pause", "WatchLease"]
    assert outcome.report == msg.PlanReport(tensors=1)
    engine.log.clear()
    engine.run(exchange.update(UpdateInfo(bucket=0)))
    assert engine.log == ["bucket"]


@pytest.mark.parametrize(
    ("fail", "log"),
    [
        ("begin", ["IsPaused", "begin", "abort"]),
        ("Pause", ["IsPaused", "begin", "Pause", "abort", "Resume"]),
        ("WatchLease", ["IsPaused", "begin", "Pause", "WatchLease", "abort", "Resume"]),
    ],
)
def test_a_start_that_fails(fail: str, log: list[str]) -> None:
    engine = Engine(fail=fail)
    engine.fails(exchange.start(msg.StartBody()), ConnectionError)
    assert engine.log == log
    assert engine.phases == ["IDLE", "IDLE"]
    assert not engine.paused


def test_a_part_that_is_refused_ends_the_update() -> None:
    engine = Engine()
    engine.run(exchange.start(msg.StartBody()))
    engine.ranks[1].fail["prepare_part"] = PlanError("wrong")
    with pytest.raises(PlanError):
        part(engine)
    assert engine.log[-3:] == ["prepare_part", "abort", "Resume"]
    assert engine.phases == ["IDLE", "IDLE"]
    assert not engine.paused


def test_a_part_that_is_refused_after_others_is_dirty() -> None:
    engine = Engine()
    engine.run(exchange.start(msg.StartBody()))
    part(engine)
    engine.ranks[1].fail["prepare_part"] = PlanError("wrong")
    with pytest.raises(PlanError):
        part(engine)
    assert engine.phases == ["DIRTY", "DIRTY"]
    assert engine.paused
    assert all(r.sticky for r in engine.ranks)


@pytest.mark.parametrize("verb", ["apply", "bucket"])
def test_a_part_that_only_some_ranks_take(verb: str) -> None:
    engine = Engine(ranks=3)
    engine.run(exchange.start(msg.StartBody()))
    engine.ranks[2].fail[verb] = BROKEN
    with pytest.raises(TransferError):
        part(engine) if verb == "apply" else engine.run(exchange.bucket(0))
    assert engine.phases == ["DIRTY"] * 3
    assert engine.paused


def test_a_part_without_an_update() -> None:
    engine = Engine(paused=True)
    with pytest.raises(NoUpdate):
        part(engine)
    assert "Resume" not in engine.log
    assert engine.phases == ["IDLE", "IDLE"]


def test_a_finish_without_an_update() -> None:
    engine = Engine(paused=True)
    engine.fails(exchange.finish(msg.FinishBody()), NoUpdate)
    assert engine.log == ["status", "commit", "abort"]
    assert engine.paused


@pytest.mark.parametrize("failing", [[0], [0, 1]])
def test_a_finish_that_fails(failing: list[int]) -> None:
    engine = Engine()
    engine.run(exchange.start(msg.StartBody()))
    part(engine)
    for i in failing:
        engine.ranks[i].fail["commit"] = BROKEN
    engine.fails(exchange.finish(msg.FinishBody("9")), TransferError)
    assert "ResetCaches" not in engine.log
    assert engine.phases == ["DIRTY", "DIRTY"]
    for r in engine.ranks:
        r.fail.clear()
    engine.run(exchange.push(PUSH))
    assert not engine.paused


@pytest.mark.parametrize("wrote", [False, True])
def test_an_abort(wrote: bool) -> None:
    engine = Engine()
    engine.run(exchange.start(msg.StartBody()))
    if wrote:
        part(engine)
    engine.run(exchange.abort(msg.AbortBody("enough")))
    assert engine.phases == (["DIRTY"] * 2 if wrote else ["IDLE"] * 2)
    assert engine.paused is wrote
    assert engine.verbs[-1].reason == "enough"  # type: ignore[union-attr]


def test_an_abort_of_nothing_resumes_nothing() -> None:
    engine = Engine(paused=True)
    engine.run(exchange.abort(msg.AbortBody()))
    assert engine.log == ["status", "abort"]


# ---- what ranks agree on ------------------------------------------------------------------


def reply(rank: int, report: msg.PlanReport | None = None, error: str = "") -> msg.Reply:
    data = TransferError(error, where=f"rank {rank}").to_dict() if error else None
    return msg.Reply(rank, msg.State("IDLE", "1"), data, report)


def test_the_first_error_is_told() -> None:
    with pytest.raises(TransferError) as caught:
        agree([reply(0), reply(1, error="one"), reply(2, error="two")])
    assert caught.value.what == "one"
    assert caught.value.where == "rank 1 (and 1 more of 3 ranks)"
    with pytest.raises(TransferError) as alone:
        agree([reply(0), reply(1, error="one")])
    assert alone.value.where == "rank 1"


def report(**kw: Any) -> msg.PlanReport:
    return msg.PlanReport(**kw)


def test_a_name_is_nowhere_if_it_is_nowhere_on_every_rank() -> None:
    """Pipeline stages and expert-parallel ranks each hold only some names."""
    agree([reply(0, report(nowhere=["a"])), reply(1, report(nowhere=["b"]))])
    with pytest.raises(PlanError, match="1 names end nowhere") as caught:
        agree([reply(0, report(nowhere=["a", "b"])), reply(1, report(nowhere=["b", "c"]))])
    assert caught.value.where == "b"


def test_a_name_is_ignored_if_every_rank_ignores_it() -> None:
    ignored = {"a": "skipped", "b": "skipped"}
    agreed = agree([reply(0, report(ignored=ignored)), reply(1, report(ignored={"b": "skipped"}))])
    assert agreed is not None
    assert agreed.ignored == {"b": "skipped"}
    agree([reply(0, report(ignored=ignored)), reply(1, report(nowhere=["a"]))])


SPEC = ParamSpec("w", "float32", (4, 4))


@pytest.mark.parametrize(
    ("reports", "left_over"),
    [
        ([report()], False),  # the rank takes all of it
        ([report(consumed={"w": 8}), report(consumed={"w": 8})], False),
        ([report(consumed={"w": 8}), report(consumed={"w": 7})], True),
        ([report(consumed={"w": 8})], True),
        ([report(consumed={"w": 12}), report(consumed={"w": 12})], False),  # replicated in part
        ([report(consumed={"w": 8}), report(nowhere=["w"])], True),
        ([report(consumed={"w": 8}), report(ignored={"w": "skipped"})], True),
        ([report(consumed={"w": 8}), report()], False),
        ([report(consumed={"w": 16}), report(nowhere=["w"])], False),
    ],
)
def test_what_all_ranks_together_leave_is_an_error(
    reports: list[msg.PlanReport], left_over: bool
) -> None:
    replies = [reply(i, r) for i, r in enumerate(reports)]
    if left_over:
        with pytest.raises(PlanError, match=r"larger than .* w \(4, 4\)") as caught:
            agree(replies, [SPEC])
        assert caught.value.where == "w"
    else:
        assert agree(replies, [SPEC]) == reports[0]


def test_ranks_that_know_the_plan_already_report_nothing() -> None:
    assert agree([reply(0), reply(1)], [SPEC]) is None
    partly = [reply(0, report(nowhere=["w"])), reply(1)]  # one of them was restarted
    assert agree(partly, [SPEC]) is None


def test_caches_must_be_reset_on_every_engine() -> None:
    exchange.must_reset(True, True)
    with pytest.raises(TransferError, match="prefix cache"):
        exchange.must_reset(True, False)
