"""A whole push inside vLLM's engine core, in one call.

The core runs a utility call between two steps and nothing else meanwhile. While no request is
under way, the exchange (begin, check, copy, commit, caches) can therefore run there without a
round trip to the API server for each of its steps: 5 ms less beside the data. The two ends of an
update in place (the bridge's), and of a broadcast, go the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.core import EngineCore

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire import broadcast, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.patches import PatchPush

T = TypeVar("T")


def _in_one_call(kind: type[T], steps: Callable[[T], exchange.Steps]) -> Callable[..., Any]:
    """A method of `EngineCore`: `exchange.PushReply` as data. Raises nothing of ours.

    `busy` when requests are under way, or caches outside the core hold old results: the caller
    then takes the steps one by one, with a pause.
    """
    decoder = msgspec.msgpack.Decoder(kind)

    def method(core: Any, payload: object) -> dict[str, Any]:
        try:
            if not isinstance(payload, bytes):
                raise RequestError("weight updates are internal", next_step="POST /push_weights")
            request = msg.decode(decoder, payload)
            if _busy(core):
                reply = exchange.PushReply(busy=True)
            else:
                reply = exchange.PushReply(exchange.run(steps(request), lambda a: perform(core, a)))
        # Across the process border errors are data, so that their kind survives.
        except Exception as exc:
            error = exchange.unexpected(exc)
            reply = exchange.PushReply(error=error.to_dict(), rolled_back=error.rolled_back)
        data: dict[str, Any] = msgspec.to_builtins(reply)
        return data

    return method


METHODS = {
    "weight_push": _in_one_call(msg.PushRequest, exchange.push),
    "weight_patch": _in_one_call(PatchPush, exchange.push),
    "weight_broadcast": _in_one_call(msg.BroadcastPush, broadcast.opening),
    "weight_go_on": _in_one_call(msg.BroadcastPush, broadcast.go_on),
    "weight_patch_broadcast": _in_one_call(PatchPush, broadcast.opening),
    "weight_patch_go_on": _in_one_call(PatchPush, broadcast.go_on),
    "weight_start": _in_one_call(msg.StartBody, exchange.start),
    "weight_finish": _in_one_call(msg.FinishBody, exchange.finish),
}


def _busy(core: Any) -> bool:
    return bool(
        core.vllm_config.parallel_config.data_parallel_size > 1
        or core.vllm_config.model_config.is_multimodal_model
        or core.scheduler.has_unfinished_requests()
        or getattr(core, "batch_queue", None)
        or getattr(core, "_idle_state_callbacks", None)
    )


def perform(core: Any, action: exchange.Action) -> Any:
    """One action of `wire/exchange.py`, in the engine core's process."""
    match action:
        case exchange.Call():
            payload = msg.encode_verbs(*action.verbs)
            rows = core.model_executor.collective_rpc("weight_sync", args=(payload,))
            return [msgspec.convert(r, msg.Reply) for r in rows]
        case exchange.IsPaused():
            return core.is_scheduler_paused()
        case exchange.Pause():
            return core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
        case exchange.Resume():
            return core.scheduler.set_pause_state(PauseState.UNPAUSED)
        case exchange.ResetCaches():
            return exchange.must_reset(core.reset_prefix_cache(True, True))
        case exchange.SetVersion():
            # The workers know it already.
            return EngineCore.set_weight_version.__wrapped__(core, action.version)
        case exchange.WatchLease() | exchange.Rest():
            return None  # the API server watches, as soon as it has the session
