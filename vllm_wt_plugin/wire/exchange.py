"""The order of things in an update, once, without I/O: who asks, who answers, what undoes it.

Each function is a generator that yields actions and is sent their results; a driver performs them
(`server/control.py` with await, `trainer/client.py` on an LLM object without). An error of an
action is thrown in, the generator undoes what was done, and raises it again.

    begin + prepare on every rank → all agree → pause → apply + commit → all did, and the checksums
    of patches agree → caches → resume
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from vllm_wt_plugin.errors import RequestError, TransferError, UpdateInProgress, WeightSyncError
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree, check_patches, check_written, slowest
from vllm_wt_plugin.wire.messages import PlanReport, Reply
from vllm_wt_plugin.wire.moved import Moved
from vllm_wt_plugin.wire.nccl import Written
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.sparse import patches
from vllm_wt_plugin.wire.update import UpdateInfo


@dataclass(frozen=True)
class Call:
    """Run verbs on every worker of every engine → list[Reply]."""

    verbs: tuple[msg.Verb, ...]


@dataclass(frozen=True)
class IsPaused:
    """→ bool"""


@dataclass(frozen=True)
class Pause:
    """Stop stepping; running requests are kept."""


@dataclass(frozen=True)
class ResetCaches:
    """Drop everything computed with the old weights; must raise if anything stays."""


@dataclass(frozen=True)
class SetVersion:
    version: str


@dataclass(frozen=True)
class Resume:
    pass


@dataclass(frozen=True)
class Rest:
    """Let others have their turn: what follows may be an abort of this very update."""


@dataclass(frozen=True)
class WatchLease:
    """Have the update end when its lease does, and resume the engine if that leaves it whole."""

    session: str
    owner: str
    resume_after: bool


Action = Call | IsPaused | Pause | ResetCaches | SetVersion | Resume | Rest | WatchLease


@dataclass(frozen=True)
class Outcome:
    """What an update did, ranks combined. `report` is there when the plan was new."""

    version: str
    seconds: dict[str, float]  # the slowest rank's, by phase
    report: PlanReport | None
    session: str = ""  # of an update that is open now, or was ended by `abort`
    moved: Moved | None = None  # where an update was committed


Steps = Generator[Action, Any, Outcome]


@dataclass(frozen=True)
class PushReply:
    """What the engine core answers to a whole push: one of the three."""

    outcome: Outcome | None = None
    error: dict[str, str] | None = None
    busy: bool = False
    rolled_back: bool = False  # with `error`


def run(steps: Steps, perform: Callable[[Action], Any]) -> Outcome:
    """Drive `steps` where actions need no awaiting. Adds the seconds of each kind of action."""
    seconds: dict[str, float] = {}
    try:
        action = next(steps)
        while True:
            start = time.perf_counter()
            try:
                result = perform(action)
            # Whatever an action raises, the steps decide what to undo.
            except Exception as exc:
                action = steps.throw(exc)
            else:
                note_time(seconds, action, start)
                action = steps.send(result)
    except StopIteration as stop:
        outcome: Outcome = stop.value
        return replace(outcome, seconds=seconds | outcome.seconds)


def note_time(seconds: dict[str, float], action: Action, start: float) -> None:
    phase = type(action).__name__.lower()
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def must_reset(*done: bool) -> None:
    """Raise unless every engine has dropped its prefix cache (vLLM says False, in silence)."""
    if not all(done):
        raise TransferError(
            "the prefix cache could not be reset", next_step="push again, or restart the engine"
        )


def core_method(request: msg.PushRequest | PatchPush) -> str:
    """The engine core's method that does the whole push in one call (`worker/core.py`)."""
    return "weight_push" if isinstance(request, msg.PushRequest) else "weight_patch"


def push(request: msg.PushRequest | PatchPush, *, begun: bool = False) -> Steps:
    """One whole update; or the rest of one that has `begun`, and whose patches are here."""
    named = request.session if isinstance(request, PatchPush) else ""
    session = named or secrets.token_hex(16)
    specs = () if isinstance(request, PatchPush) or not request.register else request.register.specs
    done: list[Reply] = []
    paused = False  # by us
    try:
        was_paused = bool((yield IsPaused()))
        verbs: tuple[msg.Verb, ...] = (_prepare(session, request, not was_paused),)
        if not begun:
            verbs = msg.Begin(session, request.owner, msg.LEASE_S, not was_paused), *verbs
        ready = yield Call(verbs)
        report = agree(ready, specs)
        if not begun:
            yield from _still_paused(was_paused, ready)
        if not was_paused:
            paused = True
            yield Pause()
        apply, commit = msg.Apply(session), msg.Commit(session, request.version)
        # Patches can be taken back after commit, tensors in full cannot.
        apart = isinstance(request, PatchPush) and request.whole
        done = yield Call((apply,) if apart else (apply, commit))
        agree(done)
        if isinstance(request, PatchPush):
            check_patches(request, done)
        if apart:
            ready += done
            done = yield Call((commit,))
            agree(done)
    except Exception as exc:
        now = yield from _undo(session, exc, done, resume=paused)
        if isinstance(exc, WeightSyncError):
            exc.rolled_back = bool(done) and all(r.state.phase == "IDLE" for r in now)
        raise
    return (yield from _publish([*ready, *done], done, report))


def _prepare(session: str, request: msg.PushRequest | PatchPush, pauses: bool) -> msg.Verb:
    if isinstance(request, PatchPush):
        return msg.PreparePatches(session, request, pauses)
    return msg.Prepare(session, request.registration, request.register, True, request.replaces)


def _still_paused(was_paused: bool, begun: list[Reply]) -> Generator[Action, Any, None]:
    """Another API process's update may have ended between the question and our beginning."""
    if was_paused and any(r.info.get("shared") for r in begun) and not (yield IsPaused()):
        raise UpdateInProgress(
            "another update has resumed the engine just now", next_step="try again"
        )


def _end_turn(replies: list[Reply]) -> Generator[Action, Any, None]:
    """The last step of an update on an engine that several API processes drive."""
    sessions = {r.info["turn"] for r in replies if "turn" in r.info}
    if sessions:
        yield Call(tuple(msg.EndTurn(s) for s in sorted(sessions)))


def begin(request: PatchPush, *more: msg.Verb) -> Steps:
    """Open the update of patches that are yet to come; the engine goes on serving."""
    session = request.session
    try:
        replies = yield Call((msg.Begin(session, request.owner, msg.LEASE_S, False), *more))
        agree(replies)
    except Exception as exc:
        yield from _undo(session, exc, [], resume=False)
        raise
    return Outcome(replies[0].state.version, slowest(replies), None, session)


def start(body: msg.StartBody, *more: msg.Verb) -> Steps:
    """Open an update of several calls, with `more` verbs in the first of them. Pauses the engine,
    unless it is paused already."""
    session = body.session or secrets.token_hex(16)
    was_paused = bool((yield IsPaused()))
    replies: list[Reply] = []
    paused = False  # by us
    try:
        verbs: tuple[msg.Verb, ...] = (
            msg.Begin(session, body.owner, body.lease_s, not was_paused),
        )
        if body.announced is not None:
            verbs += (_announce(session, body),)
        replies = yield Call(verbs + more)
        report = agree(replies, body.announce.specs if body.announce is not None else ())
        yield from _still_paused(was_paused, replies)
        if not was_paused:
            paused = True
            yield Pause()
        if body.attached is not None:  # the trainer may write as soon as it is told
            agree((yield Call((msg.Touch(session, body.attached),))))
        yield WatchLease(session, body.owner, any(r.state.resume_after for r in replies))
    except Exception as exc:
        yield from _undo(session, exc, [], resume=paused)
        raise
    return Outcome(replies[0].state.version, slowest(replies), report, session)


def _announce(session: str, body: msg.StartBody) -> msg.Announce:
    return msg.Announce(
        session, body.announced or "", body.announce, body.group, body.verify, body.round
    )


def bucket(index: int, session: str = "") -> Steps:
    """One bucket of the open, announced update."""
    done: list[Reply] = []
    try:
        done = yield Call((msg.Bucket(session, index),))
        agree(done)
    except Exception as exc:
        now = yield Call((msg.Status(),))
        yield from _undo(session, exc, done, resume=now[0].state.resume_after)
        raise
    return Outcome(done[0].state.version, slowest(done), None)


def update(
    info: UpdateInfo | list[UpdateInfo], session: str = "", push: PatchPush | None = None
) -> Steps:
    """One part of the open update, or a list of what each rank gets. A refused part ends it.

    `push`: patches that have come already."""
    infos = info if isinstance(info, list) else [info]
    if len(infos) == 1 and infos[0].bucket is not None:
        return (yield from bucket(infos[0].bucket, session))
    key = secrets.token_hex(16)
    sparse = len(infos) == 1 and infos[0].update_kind == "sparse_flat"
    push = patches(infos[0], key) if sparse and push is None else push
    parts = () if sparse else tuple(i.registrations(key) for i in infos)
    done: list[Reply] = []
    open_ = yield Call((msg.Status(),))
    if len(infos) not in (1, len(open_)):
        raise RequestError(
            f"update_info is a list of {len(infos)}, there are {len(open_)} workers",
            where="$.update_info",
            next_step="send one for all, or one for each worker, by global rank",
        )
    try:
        if push is not None:
            ready = yield Call((msg.PreparePatches(session, push),))
            report = agree(ready)
        else:
            ready = yield Call((msg.PreparePart(session, key, parts),))
            # Where every rank gets its own, none can tell what the others take of a name.
            report = agree(ready, infos[0].specs if len(infos) == 1 else ())
        done = yield Call((msg.Apply(session),))
        agree(done)
        if push is not None:
            check_patches(push, done)
    except Exception as exc:
        yield from _undo(session, exc, done, resume=open_[0].state.resume_after)
        raise
    return Outcome(done[0].state.version, slowest([*ready, *done]), report)


def finish(body: msg.FinishBody) -> Steps:
    """Commit the open update, drop old caches, resume if `start` (or a failed one) paused."""
    open_ = yield Call((msg.Status(whole=body.session),))
    done: list[Reply] = []
    try:
        agree(open_)
        if body.sums or body.told:
            written = yield Call((Written(body.session, list(body.sums)),))
            check_written(body.sums, written)
        done = yield Call((msg.Commit(body.session, body.weight_version),))
        agree(done)
    except Exception as exc:
        yield from _undo(body.session, exc, done, resume=open_[0].state.resume_after)
        raise
    return (yield from _publish(done, done, None))


def notify(body: msg.StartBody, version: str) -> Steps:
    """An attached trainer has written in place already: name it, drop caches of the old."""
    opened = yield from start(body)
    done = yield from finish(msg.FinishBody(version, opened.session))
    return done


def abort(body: msg.AbortBody) -> Steps:
    """End the named update, or whatever is open: to IDLE where nothing was written, else DIRTY.
    One that has not begun yet will not."""
    open_ = yield Call((msg.Status(),))
    resume = open_[0].state.resume_after
    why = TransferError(body.reason)
    replies = yield from _undo(body.session, why, [], resume=resume, early=True)
    session = open_[0].state.session
    return Outcome(replies[0].state.version, slowest(replies), None, session)


def _publish(all_: list[Reply], done: list[Reply], report: PlanReport | None) -> Steps:
    version = done[0].state.version
    resume = any(r.info.get("resume") for r in done)
    try:
        yield ResetCaches()
        yield SetVersion(version)
    except Exception as exc:
        # New weights with old KV would answer wrongly and in silence.
        why = f"the weights are new, but caches of the old ones could not be dropped: {exc}"
        yield Call((msg.MarkDirty(why, resume),))
        yield from _end_turn(done)
        raise
    if resume and not any(r.state.asleep for r in done):
        yield Resume()
    yield from _end_turn(done)
    moved = msgspec.convert(done[0].info.get("moved"), Moved | None)
    return Outcome(version, slowest(all_), report, moved=moved)


def _undo(
    session: str, exc: Exception, done: list[Reply], *, resume: bool, early: bool = False
) -> Generator[Action, Any, list[Reply]]:
    replies: list[Reply] = yield Call((msg.Abort(session, str(exc), early),))
    ended = [*done, *replies]
    resume = resume or any(r.info.get("resume") for r in done)
    torn = any(r.error is None for r in done) and any(r.error for r in done)
    torn = torn and not all(r.info.get("undone") for r in replies)  # patches are taken back
    dirty = [r.state.reason for r in replies if r.state.phase == "DIRTY"]
    if torn or (dirty and len(dirty) < len(replies)):
        why = dirty[0] if dirty else f"only some ranks took the update: {exc}"
        replies = yield Call((msg.MarkDirty(why, resume),))
    elif resume and all(r.state.phase == "IDLE" and not r.state.asleep for r in replies):
        yield Resume()
    yield from _end_turn(ended)
    return replies


def unexpected(exc: Exception) -> WeightSyncError:
    """Any other exception as one of ours, so that its text reaches the trainer."""
    if isinstance(exc, WeightSyncError):
        return exc
    return TransferError(f"{type(exc).__name__}: {exc}", next_step="see the server's log")
