"""The HTTP routes: vLLM's own names, without dev mode, and ours.

Bodies are decoded once, into the structs of `wire/messages.py`; every error is JSON
`{error, where, next_step, code}` with a status that says whose turn it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from vllm_wt_plugin.errors import (
    RequestError,
    TransferError,
    UnsupportedVLLM,
    WeightSyncError,
)
from vllm_wt_plugin.server import bridge
from vllm_wt_plugin.server.access import require_token
from vllm_wt_plugin.server.control import EngineControl
from vllm_wt_plugin.server.openapi import PAUSE_MODES, described
from vllm_wt_plugin.wire import broadcast, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.replies import Held, held, worst

logger = logging.getLogger("vllm.wt.server")
Handler = Callable[[Request, EngineControl], Awaitable[dict[str, Any]]]

_push = msgspec.json.Decoder(msg.PushRequest)
_patches = msgspec.json.Decoder(PatchPush)
_broadcast = msgspec.json.Decoder(msg.BroadcastPush)
_names = msgspec.json.Decoder(msg.NamesBody)
_init = msgspec.json.Decoder(msg.InitBody)
_start = msgspec.json.Decoder(msg.StartBody)
_update = msgspec.json.Decoder(msg.UpdateBody)
_finish = msgspec.json.Decoder(msg.FinishBody)
_abort = msgspec.json.Decoder(msg.AbortBody)
_version = msgspec.json.Decoder(msg.VersionBody)


async def push_weights(request: Request, control: EngineControl) -> dict[str, Any]:
    """One request = begin, check, pause, copy, commit, drop caches, resume; all ranks or none."""
    body = msg.decode(_push, await request.body())
    if body.register is not None:
        body.register.check()
    return _told(await control.push(body))


async def push_patches(request: Request, control: EngineControl) -> dict[str, Any]:
    """The same for a sparse update: what changed since `base_version`."""
    body = msg.decode(_patches, await request.body())
    if body.form == "broadcast":
        return _told(await control.push_broadcast(body, request.is_disconnected))
    body.check()
    return _told(await control.push(body))


async def push_broadcast(request: Request, control: EngineControl) -> dict[str, Any]:
    """A whole dense update through the trainer's group: start, receive and finish in one."""
    body = msg.decode(_broadcast, await request.body())
    return _told(await control.push_broadcast(body, request.is_disconnected))


async def weight_checksums(request: Request, control: EngineControl) -> dict[str, Any]:
    """Checksums of what each rank holds, by name and part; reads every weight."""
    body = msg.decode(_names, await request.body() or b"{}")
    return _told(held(await control.call(msg.Sums(body.names, body.specs)), body.specs))


async def start_weight_update(request: Request, control: EngineControl) -> dict[str, Any]:
    """Open an update of several calls; the engine is paused until it ends."""
    body = msg.decode(_start, await request.body() or b"{}")
    outcome = await control.start(body)
    return {"message": "Weight update started", **_told(outcome)}


async def update_weights(request: Request, control: EngineControl) -> dict[str, Any]:
    """One part of the open update; of one that is broadcast, all of it."""
    body = msg.decode(_update, await request.body())
    infos = body.infos
    if any(i.ipc_handles_pickled is not None for i in infos):
        require_token(request.scope)
        infos = await asyncio.to_thread(lambda: [i.unpickled() for i in infos])
    steps = broadcast.update(infos, body.session, control.backend)
    if steps is None:
        outcome = await control.run(exchange.update(infos, body.session))
    else:
        outcome = await control.receive(steps, body.session, request.is_disconnected)
    return {"message": "Weights updated", **_told(outcome)}


async def finish_weight_update(request: Request, control: EngineControl) -> dict[str, Any]:
    """Commit the open update."""
    body = msg.decode(_finish, await request.body() or b"{}")
    return {
        "message": "Weight update finished",
        **_told(await control.finish(body)),
    }


async def abort_weight_update(request: Request, control: EngineControl) -> dict[str, Any]:
    """End the open update, whatever its phase."""
    body = msg.decode(_abort, await request.body() or b"{}")
    await control.abort(body)
    return {"message": "Weight update aborted", **await status_of(control)}


async def init_weight_transfer_engine(request: Request, control: EngineControl) -> dict[str, Any]:
    """Check that trainer and workers speak the same protocol; a trainer that broadcasts has all
    workers join its group."""
    body = msg.decode(_init, await request.body())
    await control.run(broadcast.join(body.init_info))
    return {"message": "Weight transfer initialized"}


async def shutdown_weight_transfer_engine(
    request: Request, control: EngineControl
) -> dict[str, Any]:
    """Forget the trainer's handles on every worker."""
    agree(await control.call(msg.Shutdown()))
    return {"message": "Weight transfer shut down"}


async def start_draft_weight_update(request: Request, control: EngineControl) -> dict[str, Any]:
    raise UnsupportedVLLM(
        "updates of a draft model are not supported",
        next_step="serve with the backend upstream_ipc to update draft models",
    )


async def pause(request: Request, control: EngineControl) -> dict[str, Any]:
    """vLLM's pause: mode abort (default), wait or keep."""
    mode = request.query_params.get("mode", "abort")
    if mode not in PAUSE_MODES:
        raise RequestError(
            f"invalid pause mode {mode!r}", next_step=f"use one of {', '.join(PAUSE_MODES)}"
        )
    clear = request.query_params.get("clear_cache", "true").lower() not in ("false", "0", "no")
    await control.engine.pause_generation(mode=mode, clear_cache=clear)
    return {"status": "paused"}


async def resume(request: Request, control: EngineControl) -> dict[str, Any]:
    """Resume generation; refused while the weights are mixed or an update is open."""
    for reply in await control.call(msg.Status()):
        reply.state.check_resumable()
    await control.engine.resume_generation()
    return {"status": "resumed"}


async def is_paused(request: Request, control: EngineControl) -> dict[str, Any]:
    return {"is_paused": await control.engine.is_paused()}


async def get_world_size(request: Request, control: EngineControl) -> dict[str, Any]:
    parallel = control.engine.vllm_config.parallel_config
    include = request.query_params.get("include_dp", "true").lower() not in ("false", "0", "no")
    return {"world_size": parallel.world_size_across_dp if include else parallel.world_size}


async def weight_info(request: Request, control: EngineControl) -> dict[str, Any]:
    return {"weight_version": await control.engine.get_weight_version()}


async def update_weight_version(request: Request, control: EngineControl) -> dict[str, Any]:
    """Name the weights that are there, without changing them."""
    version = msg.decode(_version, await request.body()).new_version
    agree(await control.call(msg.SetVersion(version)))
    await control.engine.update_weight_version(version)
    return {"success": True, "new_version": version}


async def weight_transfer_status(request: Request, control: EngineControl) -> dict[str, Any]:
    return await status_of(control)


async def status_of(control: EngineControl) -> dict[str, Any]:
    replies = await control.call(msg.Status(memory=True))
    agree(replies)
    state, last = worst(replies), control.metrics.last
    config = control.engine.vllm_config
    return {
        "protocol": msg.PROTOCOL,
        "backend": control.backend,
        "world_size": config.parallel_config.world_size_across_dp,
        "device": config.device_config.device_type,
        "state": state.phase,
        **{
            k: getattr(state, k)
            for k in ("version", "reason", "owner", "since", "lease_left_s", "asleep")
        },
        "registrations": replies[0].info["registrations"],
        "memory": [r.info["memory"] for r in replies],
        "last_push": last if last and last["version"] == state.version else None,
    }


def _told(result: exchange.Outcome | Held) -> dict[str, Any]:
    data: dict[str, Any] = msgspec.to_builtins(result)
    return data


ROUTES: dict[tuple[str, str], Handler] = {
    ("POST", "/push_weights"): push_weights,
    ("POST", "/push_patches"): push_patches,
    ("POST", "/push_broadcast"): push_broadcast,
    ("POST", "/weight_checksums"): weight_checksums,
    ("POST", "/init_weight_transfer_engine"): init_weight_transfer_engine,
    ("POST", "/start_weight_update"): start_weight_update,
    ("POST", "/start_draft_weight_update"): start_draft_weight_update,
    ("POST", "/update_weights"): update_weights,
    ("POST", "/finish_weight_update"): finish_weight_update,
    ("POST", "/abort_weight_update"): abort_weight_update,
    ("POST", "/shutdown_weight_transfer_engine"): shutdown_weight_transfer_engine,
    ("POST", "/pause"): pause,
    ("POST", "/resume"): resume,
    ("GET", "/is_paused"): is_paused,
    ("GET", "/get_world_size"): get_world_size,
    ("GET", "/weight_info"): weight_info,
    ("POST", "/update_weight_version"): update_weight_version,
    ("GET", "/weight_transfer_status"): weight_transfer_status,
    **bridge.ROUTES,
}
PATHS = frozenset(path for _, path in ROUTES)


def router() -> APIRouter:
    """All routes; each expects `app.state.wt_control`."""
    out = APIRouter(tags=["weight sync"])
    for (method, path), handler in ROUTES.items():
        out.add_api_route(
            path, _answered(handler), methods=[method], name=handler.__name__,
            openapi_extra=described(path),
        )  # fmt: skip
    return out


def _answered(handler: Handler) -> Callable[[Request], Awaitable[JSONResponse]]:
    async def answer(request: Request) -> JSONResponse:
        try:
            control: EngineControl | None = getattr(request.app.state, "wt_control", None)
            if control is None:
                raise TransferError("the weight sync plugin did not start", next_step="see the log")
            return JSONResponse(await handler(request, control))
        except WeightSyncError as exc:
            return JSONResponse(exc.to_dict(), status_code=exc.status)
        except ClientDisconnect:  # before its body was complete: nothing was done, nobody reads
            logger.info("weight sync: %s: the client hung up", request.url.path)
            return JSONResponse(None, status_code=RequestError.status)
        # The engine's own failures (dead engine, refused pause) must reach the trainer as text.
        except Exception as exc:
            logger.exception("weight sync: %s failed", request.url.path)
            error = exchange.unexpected(exc)
            return JSONResponse(error.to_dict(), status_code=error.status)

    answer.__doc__ = handler.__doc__
    return answer


__all__ = ["PATHS", "PAUSE_MODES", "router"]
