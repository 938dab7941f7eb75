"""The bridge's routes: where the weights live, for a trainer on this host that writes in place."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_wt_plugin.errors import TransferError, WeightSyncError
from vllm_wt_plugin.server.access import require_same_host
from vllm_wt_plugin.server.control import EngineControl
from vllm_wt_plugin.wire import bridge, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.wire.bridge import refuse_sleep

_export = msgspec.json.Decoder(bridge.ExportBody)
_notify = msgspec.json.Decoder(bridge.NotifyBody)
_detach = msgspec.json.Decoder(bridge.DetachBody)


async def export_cuda_ipc(request: Request, control: EngineControl) -> dict[str, Any]:
    """Attach a trainer of this host: handles of live memory, and every parameter's view in it."""
    require_same_host(request.scope)
    body = msg.decode(_export, await request.body())
    verb = msg.Export(secrets.token_hex(16), body.specs, body.owner, body.presence)
    replies = await control.call(verb)
    agree(replies)
    exported = msgspec.convert(replies[0].info["exported"], bridge.Exported)
    if folder := os.environ.get("LOGDIR"):
        try:
            _write(Path(folder), control.engine.vllm_config.model_config.model, exported)
        except OSError as exc:
            await control.call(msg.Detach(verb.attached))
            raise TransferError(
                f"{bridge.CONFIG_FILE} cannot be written: {exc.strerror}",
                where="LOGDIR of the server",
                next_step="start the server with a LOGDIR it may write to, or without one",
            ) from exc
    data: dict[str, Any] = msgspec.to_builtins(
        {"attached": exported.attached, "registration": exported.registration}
    )
    return data


def _write(folder: Path, model: str, exported: bridge.Exported) -> None:
    """Whole or not at all, readable by this user alone: handles are keys to the GPU's memory."""
    folder.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{bridge.CONFIG_FILE}.", dir=folder)  # mode 0600
    try:
        with os.fdopen(fd, "w") as file:
            json.dump(bridge.config_file(model, exported), file, indent=1)
        os.replace(name, folder / bridge.CONFIG_FILE)
    except BaseException:  # raised again: nothing half-written stays, even where the server ends
        os.unlink(name)
        raise


async def notify_update(request: Request, control: EngineControl) -> dict[str, Any]:
    """A trainer has written in place: name the weights, drop the caches of the old ones."""
    body = msg.decode(_notify, await request.body())
    owner = f"trainer rank {body.trainer_rank}"
    version = str(body.update_count) if body.version is None else body.version
    start = msg.StartBody(owner=owner, attached=body.attached)
    outcome = await control.run(exchange.notify(start, version))
    data: dict[str, Any] = msgspec.to_builtins(outcome)
    return {"status": "ok", "update_count": body.update_count} | data


async def status(request: Request, control: EngineControl) -> dict[str, Any]:
    """Who is attached, and which model and version is served."""
    replies = await control.call(msg.Status())
    agree(replies)
    state, attached = replies[0].state, replies[0].info["attached"]
    return {
        "model": control.engine.vllm_config.model_config.model,
        "attached": sorted(attached.values()),
        "state": state.phase,
        "version": state.version,
        "reason": state.reason,
    }


async def detach(request: Request, control: EngineControl) -> dict[str, Any]:
    """Forget a trainer, or every one. The weights stay as and where they are."""
    body = msg.decode(_detach, await request.body() or b"{}")
    agree(await control.call(msg.Detach(body.attached)))
    return await status(request, control)


class SleepGate:
    """vLLM's own `/sleep` (dev mode) would move weights that a trainer computes with. The engine
    core refuses that too, but vLLM answers its caller with a bare 500."""

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        control: EngineControl | None = getattr(self.api.state, "wt_control", None)
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if control is None or (scope["type"], path) != ("http", "/sleep"):
            return await self.app(scope, receive, send)
        try:
            if Request(scope).query_params.get("level", "1") != "0":
                replies = await control.call(msg.Status())
                agree(replies)
                refuse_sleep(*(r.info["attached"] for r in replies))
        except WeightSyncError as exc:
            response = JSONResponse(exc.to_dict(), status_code=exc.status)
            return await response(scope, receive, send)
        await self.app(scope, receive, send)


ROUTES = {
    ("POST", "/bridge/export_cuda_ipc"): export_cuda_ipc,
    ("POST", "/bridge/notify_update"): notify_update,
    ("GET", "/bridge/status"): status,
    ("POST", "/bridge/detach"): detach,
}
