"""The order of things where a trainer broadcasts: joining its group, receiving from it.

Generators as in `exchange.py`. What takes long runs on threads of the workers, and is looked at
again and again; between two looks others have their turn, so that an abort need not wait.
"""

from __future__ import annotations

from typing import Any

from vllm_wt_plugin.errors import NoUpdate, TransferError
from vllm_wt_plugin.wire import exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.exchange import Call, Outcome, Rest, Steps, agree
from vllm_wt_plugin.wire.nccl import Joined, Progress, Receive


def join(info: dict[str, Any]) -> Steps:
    """What a trainer says before its first update; ends when every worker is in its group."""
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
    return Outcome(replies[0].state.version, exchange.slowest(replies), None)


def receive(session: str = "") -> Steps:
    """All buckets of the open, announced update, through its trainer's group."""
    seconds: dict[str, float] = {}
    try:
        replies = yield Call((Receive(session),))
        agree(replies)
        while any(r.info["receiving"] for r in replies):
            yield Rest()
            replies = yield Call((Progress(session),))
            agree(replies)
            for phase, s in exchange.slowest(replies).items():
                seconds[phase] = seconds.get(phase, 0.0) + s
    except Exception as exc:
        now = yield Call((msg.Status(),))
        yield from exchange.abort(msg.AbortBody(str(exc)[:4096], session))
        if isinstance(exc, NoUpdate):  # between two looks somebody else has ended it
            why = next((r.state.reason for r in now if r.state.reason), "it was aborted")
            raise TransferError(why, next_step="push again") from exc
        raise
    return Outcome(replies[0].state.version, seconds, None)
