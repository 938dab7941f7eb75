"""The order of things where a trainer broadcasts: joining its group, receiving from it.

Generators as in `exchange.py`. What takes long runs on threads of the workers, and is looked at
again and again; between two looks others have their turn, so that an abort need not wait.
"""

from __future__ import annotations

from typing import Any

from vllm_wt_plugin.errors import NoUpdate, TransferError
from vllm_wt_plugin.wire import exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree, slowest
from vllm_wt_plugin.wire.exchange import Call, Outcome, Rest, Steps
from vllm_wt_plugin.wire.nccl import Joined, NcclInit, Progress, Receive, ReceiveNamed
from vllm_wt_plugin.wire.params import ParamSpec, check_specs
from vllm_wt_plugin.wire.update import UpdateInfo


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


def update(infos: list[UpdateInfo], session: str, *, by_group: bool) -> Steps | None:
    """How the bytes of this part are received; None where it hands them over in memory.

    `by_group`: who only names tensors sends them through a group, as vLLM's `nccl` does.
    """
    if any(i.broadcast for i in infos):
        return receive(session)
    if by_group and len(infos) == 1 and _only_names(infos[0]):
        return named(infos[0], session)
    return None


def _only_names(info: UpdateInfo) -> bool:
    memory = info.storages or info.handles or info.ipc_handles or info.ipc_handles_pickled
    return not memory and info.bucket is None and info.update_kind == "dense"


def named(info: UpdateInfo, session: str = "") -> Steps:
    """The same for vLLM's own trainers, which name the tensors where ours announce them."""
    info.check_sizes("dtype_names", "shapes")
    specs = tuple(map(ParamSpec, info.names, info.dtype_names, info.shapes))
    check_specs(specs)
    return (yield from receive(session, ReceiveNamed(session, specs, info.packed), specs))


def receive(
    session: str = "", begin: msg.Verb | None = None, specs: tuple[ParamSpec, ...] = ()
) -> Steps:
    """All buckets of the open, announced update, through its trainer's group."""
    seconds: dict[str, float] = {}
    begun = False
    try:
        replies = yield Call((begin or Receive(session),))
        agree(replies, specs)
        begun = True
        while any(r.info["receiving"] for r in replies):
            yield Rest()
            replies = yield Call((Progress(session),))
            agree(replies)
            for phase, s in slowest(replies).items():
                seconds[phase] = seconds.get(phase, 0.0) + s
    except Exception as exc:
        now = yield Call((msg.Status(),))
        yield from exchange.abort(msg.AbortBody(str(exc)[:4096], session))
        if begun and isinstance(exc, NoUpdate):  # between two looks somebody else has ended it
            why = next((r.state.reason for r in now if r.state.reason), "it was aborted")
            raise TransferError(why, next_step="push again") from exc
        raise
    return Outcome(replies[0].state.version, seconds, None)
