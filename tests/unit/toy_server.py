"""The plugin's real routes over HTTP, in front of toy workers: a server that starts in a moment.

What stands in for vLLM's engine has its interface and none of its work: it cannot generate.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import prometheus_client
import uvicorn
from fastapi import FastAPI

from tests.unit import toys
from tests.unit.test_session import Worker
from vllm_wt_plugin.server.access import AccessMiddleware, AccessPolicy
from vllm_wt_plugin.server.control import EngineControl
from vllm_wt_plugin.server.plugin import DirtyGate
from vllm_wt_plugin.server.routes import PATHS, router


class ToyEngine:
    """What `EngineControl` asks of vLLM's `AsyncLLM` and of its engine core."""

    core_engines = (None,)

    def __init__(self, ranks: int = 1) -> None:
        self.workers = [Worker(rank=r) for r in range(ranks)]
        self.paused, self.version = False, "default"
        self.engine_core = self
        self.model_config = SimpleNamespace(model="toy", is_multimodal_model=False)
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config,
            weight_transfer_config=SimpleNamespace(backend="ipc"),
            device_config=SimpleNamespace(device_type="cpu"),
            parallel_config=SimpleNamespace(world_size=ranks, world_size_across_dp=ranks),
        )

    async def call_utility_all_async(self, name: str, *args: Any) -> list[Any]:
        match name:
            case "collective_rpc":
                return [[w.session.call(*args[2]) for w in self.workers]]
            case "is_scheduler_paused":
                return [self.paused]
            case "reset_prefix_cache":
                return [True]
            case "set_weight_version":
                self.version = args[0]
                return [None]
        return [{"busy": True}]  # a whole push in one call is `worker/core.py`'s

    async def pause_scheduler_async(self, **_: Any) -> None:
        self.paused = True

    async def resume_scheduler_async(self) -> None:
        self.paused = False

    async def pause_generation(self, **_: Any) -> None:
        self.paused = True

    async def resume_generation(self) -> None:
        self.paused = False

    async def is_paused(self) -> bool:
        return self.paused

    async def get_weight_version(self) -> str:
        return self.version

    async def update_weight_version(self, version: str) -> None:
        self.version = version

    def weights(self) -> list[bytes]:
        """Every bit that can be reached from the models."""
        return [
            t.contiguous().reshape(-1).view(toys.torch.uint8).numpy().tobytes()
            for w in self.workers
            for t in toys.live_tensors(w.host.model).values()
        ]


def app_of(engine: ToyEngine, policy: AccessPolicy | None = None) -> FastAPI:
    """As `WeightSyncPlugin` puts it together, with vLLM's `/metrics` beside it."""
    app = FastAPI()
    app.include_router(router())
    app.add_middleware(DirtyGate, api=app)
    app.add_middleware(
        AccessMiddleware, policy=policy or AccessPolicy(), guarded=lambda p, _: p in PATHS
    )
    app.state.wt_control = EngineControl(engine)
    app.mount("/metrics", prometheus_client.make_asgi_app())
    return app


class ToyServer:
    """`with ToyServer(engine) as server`: uvicorn in a thread, on loopback."""

    def __init__(self, engine: ToyEngine, policy: AccessPolicy | None = None) -> None:
        self.engine, self.app = engine, app_of(engine, policy)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning"))
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def __enter__(self) -> Self:
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            threading.Event().wait(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
