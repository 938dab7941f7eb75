"""The endpoint plugin: routes, access rules and the DIRTY gate, on vLLM's API server."""

from __future__ import annotations

import logging
import os
from argparse import Namespace
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_wt_plugin.errors import EngineDirty, UnsupportedVLLM, WeightSyncError
from vllm_wt_plugin.server.access import AccessMiddleware, AccessPolicy
from vllm_wt_plugin.server.bridge import SleepGate
from vllm_wt_plugin.server.control import EngineControl
from vllm_wt_plugin.server.routes import PATHS, router
from vllm_wt_plugin.wire.messages import BACKENDS

logger = logging.getLogger("vllm.wt.server")
# What an operator does with a DIRTY engine; everything else that is posted asks for tokens.
_MANAGEMENT = frozenset(
    {
        "/abort_requests",
        "/sleep",
        "/wake_up",
        "/reset_prefix_cache",
        "/reset_mm_cache",
        "/reset_encoder_cache",
        "/collective_rpc",
        "/start_profile",
        "/stop_profile",
    }
)


class DirtyGate:
    """Answers 503 with the reason instead of letting requests queue on a paused, DIRTY engine."""

    def __init__(self, app: ASGIApp, api: FastAPI) -> None:
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        control: EngineControl | None = getattr(self.api.state, "wt_control", None)
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if (
            control is None
            or not control.dirty
            or scope["type"] != "http"
            or scope["method"] != "POST"
            or path in PATHS | _MANAGEMENT
        ):
            return await self.app(scope, receive, send)
        try:
            control.refuse_if_dirty()
        except EngineDirty as exc:
            response = JSONResponse(exc.to_dict(), status_code=exc.status)
            await response(scope, receive, send)


class WeightSyncPlugin:
    """What vLLM calls `EndpointPlugin`: routes first, the engine later."""

    name = "wt"
    required_tasks = None
    attached = False

    def attach_router(self, app: FastAPI) -> None:
        """Never raises: vLLM does not catch here. On failure the app is as it was."""
        routes, middleware = list(app.router.routes), list(app.user_middleware)
        try:
            self._attach(app)
        # Whatever it is: routes without their access rules must not stay, and vLLM must start.
        except Exception as exc:
            app.router.routes[:] = routes
            app.user_middleware[:] = middleware
            logger.error("vllm_wt_plugin: no weight routes are served: %s", exc)

    def _attach(self, app: FastAPI) -> None:
        args = app.state.args
        backend = _backend(args)
        if backend not in BACKENDS:
            logger.info("vllm_wt_plugin: backend %r is not ours, no routes added", backend)
            return
        from vllm_wt_plugin import _version

        _version.check()
        from vllm_wt_plugin import _vllm

        if not _vllm.serves(backend):  # ours would take the place of vLLM's own routes
            raise UnsupportedVLLM(f"backend {backend!r} is vLLM's own: `register` did not succeed")
        keys = args.api_key or [os.environ.get("VLLM_API_KEY")]
        policy = AccessPolicy.from_env(os.environ, [k for k in keys if k])
        known = list(app.router.routes)
        app.include_router(router())
        _put_first(app, known)
        app.add_middleware(SleepGate, api=app)
        app.add_middleware(DirtyGate, api=app)
        app.add_middleware(AccessMiddleware, policy=policy, guarded=lambda p, _: p in PATHS)
        self.attached = True

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Never raises. Without an engine (render server) the routes answer with an error."""
        if engine_client is None or not self.attached:
            return
        control = EngineControl(engine_client)
        try:
            await control.check()
        except WeightSyncError as exc:
            logger.error("vllm_wt_plugin: the workers do not take part: %s", exc)
            return
        state.wt_control = control
        if getattr(args, "api_server_count", None) not in (None, 0, 1):
            control.start_polling()


def _put_first(app: FastAPI, known: list[BaseRoute]) -> None:
    """Ours before the `known` ones: a router looks through them in order, and each of vLLM's takes
    its time. Those that ours replace go: vLLM < 0.32 has (dev mode's) of its own."""
    ours = [r for r in app.router.routes if r not in known]
    taken = {(r.path, m) for r in ours if isinstance(r, APIRoute) for m in r.methods}
    app.router.routes[:] = ours + [
        r
        for r in known
        if not isinstance(r, APIRoute) or any((r.path, m) not in taken for m in r.methods)
    ]


def _backend(args: Namespace) -> str | None:
    config = getattr(args, "weight_transfer_config", None)
    return (
        config.get("backend", "nccl")
        if isinstance(config, dict)
        else getattr(config, "backend", None)
    )


def plugin() -> WeightSyncPlugin:
    """The entry point's factory."""
    return WeightSyncPlugin()
