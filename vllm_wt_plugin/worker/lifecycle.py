"""vLLM's own weight-transfer calls (`LLM.update_weights`, a Ray actor's), inside the engine core.

They reach the core as `collective_rpc` by name. There each becomes the exchange that a route would
run: all ranks or none, and what failed is ended. As in vLLM the caller pauses, not we.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from vllm_wt_plugin.errors import NoUpdate, UnsupportedVLLM, WeightSyncError
from vllm_wt_plugin.wire import broadcast, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.worker.core import perform

REST_S = 0.005
LEASE_S = 3600.0  # the caller holds the engine itself: it cannot die alone


def _init(core: Any, init_info: dict[str, Any]) -> None:
    _run(core, broadcast.join(init_info))


def _start(core: Any, is_checkpoint_format: bool = True) -> None:
    said = {"is_checkpoint_format": is_checkpoint_format}
    body = msg.convert({"owner": "vLLM's own API", "lease_s": LEASE_S, **said}, msg.StartBody)
    core._wt_session = _run(core, exchange.start(body)).session


def _start_draft(core: Any) -> None:
    raise UnsupportedVLLM(
        "updates of a draft model are not supported",
        next_step="serve with the backend upstream_ipc to update draft models",
    )


def _update(core: Any, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
    session = _session(core)
    infos = msg.convert({"update_info": update_info}, msg.UpdateBody).infos
    steps = broadcast.update(infos, session, core.vllm_config.weight_transfer_config.backend)
    _run(core, exchange.update(infos, session) if steps is None else steps)


def _finish(core: Any) -> None:
    _run(core, exchange.finish(msg.FinishBody(None, _session(core))))


def _shutdown(core: Any) -> None:
    agree(perform(core, exchange.Call((msg.Shutdown(),))))


CALLS: dict[str, Callable[..., None]] = {
    "init_weight_transfer_engine": _init,
    "start_weight_update": _start,
    "start_draft_weight_update": _start_draft,
    "update_weights": _update,
    "finish_weight_update": _finish,
    "shutdown_weight_transfer_engine": _shutdown,
}


def call(core: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> None:
    """Raises RuntimeError, as vLLM's own calls do."""
    try:
        CALLS[method](core, *args, **(kwargs or {}))
    except WeightSyncError as exc:
        raise RuntimeError(str(exc)) from exc


def _session(core: Any) -> str:
    session: str = getattr(core, "_wt_session", "")
    if not session:
        raise NoUpdate("no update is open", next_step="call start_weight_update first")
    return session


def _run(core: Any, steps: exchange.Steps) -> exchange.Outcome:
    """Nothing is paused or resumed: an `LLM` runs nothing between two calls of `generate`, and
    who has an `AsyncLLM` pauses it, or has requests go on between two parts as vLLM does."""

    def act(action: exchange.Action) -> Any:
        match action:
            case exchange.IsPaused():
                return True
            case exchange.Rest():
                return time.sleep(REST_S)
        return perform(core, action)

    return exchange.run(steps, act)
