"""The order of things where a trainer broadcasts: joining its group, receiving from it.

Generators as in `exchange.py`. What takes long runs on threads of the workers, and is looked at
again and again; between two looks others have their turn, so that an abort need not wait.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from vllm_wt_plugin.errors import NoUpdate, TransferError
from vllm_wt_plugin.wire import exchange, sparse
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree, slowest
from vllm_wt_plugin.wire.exchange import Action, Call, Outcome, Rest, Steps
from vllm_wt_plugin.wire.messages import Reply
from vllm_wt_plugin.wire.nccl import (
    Joined,
    Leave,
    NcclInit,
    Progress,
    Receive,
    ReceiveNamed,
    ReceivePatches,
)
from vllm_wt_plugin.wire.params import ParamSpec, check_specs
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.update import UpdateInfo

T = TypeVar("T")
Broadcast = msg.BroadcastPush | PatchPush


def join(info: dict[str, Any]) -> Steps:
    """What a trainer says before its first update; ends when every worker is in its group."""
    msg.convert(info, NcclInit if "world_size" in info else msg.IpcInit)  # nothing was done yet
    try:
        replies = yield Call((msg.Init(info),))
        agree(replies)
        while "world_size" in info:
            replies = yield Call((Joined(),))
            agree(replies)
            if not any(r.info["joining"] for r in replies):
                break
            yield Rest()
    except Exception:
        yield Call((msg.Shutdown(),))  # the others wait for one that will not come
        raise
    return Outcome(replies[0].state.version, slowest(replies), None)


def update(infos: list[UpdateInfo], session: str, backend: str) -> Steps | None:
    """How the bytes of this part are received; None where it hands them over in memory.

    Who only names tensors to a `backend` of vLLM's that broadcasts sends them through a group.
    """
    if any(i.broadcast for i in infos):
        return receive(session)
    if backend not in msg.BY_GROUP or len(infos) != 1 or not infos[0].only_names:
        return None
    return _or_leave(_theirs(infos[0], session, backend), session)


def _theirs(info: UpdateInfo, session: str, backend: str) -> Steps:
    if info.update_kind == "sparse_flat":
        return patches(info, session)
    if backend == "sparse_nccl" and info.num_updates_list is not None:  # vLLM's, which says no kind
        return patches(
            msgspec.structs.replace(info, update_kind="sparse_flat"), session, narrow=True
        )
    return named(info, session)


def _or_leave(steps: Steps, session: str) -> Steps:
    """`steps` of a trainer that may be sending already: where they fail, what it sent must not be
    taken for the next update's, so the group ends, and with it the trainer's wait."""
    try:
        return (yield from _or_abort(steps, session))
    except Exception:
        yield Call((Leave(),))
        raise


def _or_abort(steps: Generator[Action, Any, T], session: str) -> Generator[Action, Any, T]:
    """`steps` of an open update; where they fail, it is ended."""
    try:
        return (yield from steps)
    except Exception as exc:  # raised again
        yield from exchange.abort(msg.AbortBody(str(exc)[:4096], session))
        raise


def named(info: UpdateInfo, session: str = "") -> Steps:
    """The same for vLLM's own trainers, which name the tensors where ours announce them."""
    info.check_dense()
    info.check_sizes("dtype_names", "shapes")
    specs = tuple(map(ParamSpec, info.names, info.dtype_names, info.shapes))
    check_specs(specs)
    begin = ReceiveNamed(session, specs, info.packed, info.packed_buffer_size_bytes)
    return (yield from receive(session, begin, specs))


def patches(info: UpdateInfo, session: str = "", *, narrow: bool = False) -> Steps:
    """Patches of one part of the open update: broadcast, then checked and applied."""
    push = sparse.named(info, secrets.token_hex(16))
    yield from receive(session, ReceivePatches(session, push, narrow))
    return (yield from exchange.update(info, session, push))


def receive(
    session: str = "", begin: msg.Verb | None = None, specs: tuple[ParamSpec, ...] = ()
) -> Steps:
    """All buckets of the open, announced update, through its trainer's group."""

    def all_of_it() -> Generator[Action, Any, tuple[list[Reply], dict[str, float]]]:
        replies = yield Call((begin or Receive(session),))
        agree(replies, specs)
        return (yield from _arrive(session, replies))

    replies, seconds = yield from _or_abort(all_of_it(), session)
    return Outcome(replies[0].state.version, seconds, None)


def checked(push: Broadcast) -> Broadcast:
    """Raises RequestError. With a session, which its calls go by."""
    push.check()
    if isinstance(push, PatchPush) and not push.session:
        return msgspec.structs.replace(push, session=secrets.token_hex(16))
    return push


def core_methods(push: Broadcast) -> tuple[str, str]:
    """The engine core's methods of `opening` and `go_on` (`worker/core.py`)."""
    if isinstance(push, PatchPush):
        return "weight_patch_broadcast", "weight_patch_go_on"
    return "weight_broadcast", "weight_go_on"


def push(given: Broadcast) -> Steps:
    """A whole update that is broadcast."""
    push = checked(given)
    steps = [(yield from opening(push))]
    while steps[-1].session:
        yield Rest()
        steps.append((yield from go_on(push)))
    return in_all(*steps)


def opening(push: Broadcast) -> Steps:
    """Open the update of `push`, begin to receive it, and go on once."""
    if isinstance(push, PatchPush):
        begun = yield from exchange.begin(push, ReceivePatches(push.session, push))
    else:
        s = push.start
        begun = yield from exchange.start(s, Receive(s.session, together=True, forms=push.forms))
    yield Rest()
    return in_all(begun, (yield from go_on(push)))


def go_on(push: Broadcast) -> Steps:
    """Take what has come of it, and commit once that is all: it is open as long as the outcome
    says a session. Patches arrive while the engine serves: it is paused to write them alone."""
    replies = yield from _or_abort(_look(push.session), push.session)
    came = Outcome(replies[0].state.version, slowest(replies), None, push.session)
    if _coming(replies):
        return came
    if isinstance(push, PatchPush):
        end = exchange.push(push, begun=True)
    else:
        end = exchange.finish(push.finish)
    return in_all(came, (yield from end))


def in_all(*steps: Outcome) -> Outcome:
    """The last of several steps, with the seconds of all."""
    seconds: dict[str, float] = {}
    for step in steps:
        for phase, s in step.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + s
    return replace(steps[-1], seconds=seconds)


def _arrive(
    session: str, replies: list[Reply]
) -> Generator[Action, Any, tuple[list[Reply], dict[str, float]]]:
    """Look at what was begun until every rank has all of it; the last replies, and seconds."""
    seconds: dict[str, float] = {}
    while _coming(replies):
        yield Rest()
        replies = yield from _look(session)
        for phase, s in slowest(replies).items():
            seconds[phase] = seconds.get(phase, 0.0) + s
    return replies, seconds


def _look(session: str) -> Generator[Action, Any, list[Reply]]:
    """Have every rank take what is there."""
    try:
        replies: list[Reply] = yield Call((Progress(session),))
        agree(replies)
    except NoUpdate as exc:  # between two looks somebody else has ended it
        now = yield Call((msg.Status(),))
        why = next((r.state.reason for r in now if r.state.reason), "it was aborted")
        raise TransferError(why, next_step="push again") from exc
    return replies


def _coming(replies: list[Reply]) -> bool:
    """Whether there is more to come."""
    return any(r.info["receiving"] for r in replies)
