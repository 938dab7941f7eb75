"""A server of the plugin's real routes whose workers run toy models, in a process of its own.

Everything between HTTP and the live tensors is the product's; only vLLM's engine is played: its
core answers one call after another, as vLLM's does, and every rank of it lives in this process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from types import SimpleNamespace, TracebackType
from typing import Any, ClassVar, Self

import httpx
import torch

from tests.support.forked import forked
from tests.support.ports import free_port
from tests.unit import toys


class Model(toys.Whole):
    """Sharded and in place, packed after loading, and through the loader."""

    parts: ClassVar = {
        "fused": toys.Fused,
        "packed": toys.TOYS["processed_pack_empty"],
        "values": toys.ReadsValues,
    }


def weights(seed: int) -> dict[str, torch.Tensor]:
    """The checkpoint of a seed."""
    return toys.checkpoint(Model(), seed)


class ToyReplica:
    """`faults`: what it does once: `kill:N`, `stop:N` itself at bucket N; `flip:N` a bit of it;
    `flip:N:M` only of the one that comes after M others of that number."""

    def __init__(self, *faults: str, world: int = 1) -> None:
        self._args = (free_port(), world, *faults)
        self.url = f"http://127.0.0.1:{self._args[0]}"
        self.http = httpx.Client(base_url=self.url, timeout=30, trust_env=False)
        self.start()

    def start(self) -> None:
        """Again, at the same address, after its process was killed."""
        self.process = forked(main, *self._args)

    def wait(self) -> Self:
        """Until it serves."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self.status()
            except httpx.TransportError:
                if not self.process.is_alive() or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return self

    def status(self) -> dict[str, Any]:
        data: dict[str, Any] = self.http.get("/weight_transfer_status").json()
        return data

    def holds(self, seed: int) -> bool:
        """Whether every rank's live tensors are those of a fresh load of this seed, bit for bit."""
        return bool(self.http.get(f"/holds/{seed}").json()["same"])

    def serves(self, seed: int, version: str) -> bool:
        s = self.status()
        return (s["state"], s["version"], self.holds(seed)) == ("IDLE", version, True)

    def paused(self) -> bool:
        return bool(self.http.get("/is_paused").json()["is_paused"])

    def signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)
        if number == signal.SIGKILL:
            self.process.join(20)

    def end(self) -> None:
        """Idempotent."""
        self.http.close()
        self.process.kill()
        self.process.join(20)

    def __enter__(self) -> Self:
        return self.wait()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.end()


# ---- in the other process ------------------------------------------------------------------


class _Core:
    """vLLM's client of an engine core, as `EngineControl` uses it."""

    core_engines = (0,)

    def __init__(self, world: int) -> None:
        from tests.unit.test_session import Worker

        self.workers = [Worker(Model, r, world) for r in range(world)]
        self.paused, self.turn = False, asyncio.Lock()

    async def call_utility_all_async(self, method: str, *args: Any) -> list[Any]:
        async with self.turn:
            match method:
                case "collective_rpc":
                    return [await asyncio.to_thread(self._run, args[2][0])]
                case "is_scheduler_paused":
                    return [self.paused]
                case _ if method.startswith("weight_"):
                    return [{"busy": True}]
                case _:
                    return [True]

    def _run(self, payload: bytes) -> list[dict[str, Any]]:
        return [w.session.call(payload) for w in self.workers]

    async def pause_scheduler_async(self, **_: object) -> None:
        self.paused = True

    async def resume_scheduler_async(self) -> None:
        self.paused = False

    def holds(self, seed: int) -> bool:
        same = []
        for w in self.workers:
            want = toys.fresh(Model, seed, w.session.rank, len(self.workers)).model
            have, wanted = toys.live_tensors(w.host.model), toys.live_tensors(want)
            same += [toys.same_bits(have[n], t) for n, t in wanted.items()]
        return all(same)


def _app(core: _Core) -> Any:
    from fastapi import FastAPI

    from vllm_wt_plugin.server.control import EngineControl
    from vllm_wt_plugin.server.routes import router

    async def is_paused() -> bool:
        return core.paused

    app = FastAPI()
    app.include_router(router())
    engine = SimpleNamespace(
        engine_core=core, is_paused=is_paused,
        model_config=SimpleNamespace(is_multimodal_model=False),
        vllm_config=SimpleNamespace(
            weight_transfer_config=SimpleNamespace(backend="nccl"),
            parallel_config=SimpleNamespace(
                world_size=len(core.workers), world_size_across_dp=len(core.workers)
            ),
            device_config=SimpleNamespace(device_type="cpu"),
        ),
    )  # fmt: skip
    app.state.wt_control = EngineControl(engine)
    app.add_api_route("/holds/{seed}", lambda seed: {"same": core.holds(int(seed))})
    return app


def _sabotage(fault: str) -> None:
    from vllm_wt_plugin.worker.packed import PackedUpdate

    what, number, *later = fault.split(":")
    receive, left = PackedUpdate.receive, int(later[0]) if later else 0

    def bad(self: Any) -> None:
        nonlocal left
        if self._next == int(number):
            left -= 1
        if self._next == int(number) and left == -1:
            if what == "flip":
                self.memory[self._next % len(self.memory)][3] ^= 64
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what])
        receive(self)

    PackedUpdate.receive = bad  # type: ignore[method-assign]


def main(port: int, world: int, *faults: str) -> None:
    import uvicorn

    torch.set_num_threads(1)
    for fault in faults:
        _sabotage(fault)
    app = _app(_Core(world))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")
