"""Real Ray, real pushes through shared memory, toy engines: what a trainer has of an actor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit import toys
from tests.unit.test_session import Model, Worker
from vllm_wt_plugin import PlanError, RequestError, ServerUnreachable, WeightSync

ray: Any = pytest.importorskip("ray")
CONFIG = SimpleNamespace(
    parallel_config=SimpleNamespace(data_parallel_size=1, world_size_across_dp=1),
    device_config=SimpleNamespace(device_type="cpu"),
    weight_transfer_config=SimpleNamespace(backend="ipc"),
)


class ToyLLM:
    """The part of `vllm.LLM` that a push needs, before a toy model. Busy, as if it generated."""

    def __init__(self) -> None:
        self.worker = Worker()
        core = SimpleNamespace(call_utility=lambda *_: {"busy": True})
        self.llm_engine = SimpleNamespace(
            engine_core=core, vllm_config=CONFIG, model_config=SimpleNamespace(
                is_multimodal_model=False), set_weight_version=lambda _: None,
        )  # fmt: skip

    def generate(self) -> None: ...

    def collective_rpc(self, method: str, args: tuple[bytes]) -> list[dict[str, Any]]:
        assert method == "weight_sync"
        return [self.worker.session.call(*args)]

    def reset_prefix_cache(self, **_: bool) -> bool:
        return True


class ToyAsyncLLM:
    """The same of `AsyncLLM`."""

    vllm_config = CONFIG
    model_config = SimpleNamespace(is_multimodal_model=False)

    def __init__(self) -> None:
        self.worker = Worker()
        self.paused = False
        self.engine_core = self
        self.core_engines = [b"0"]
        self.output_handler = asyncio.get_running_loop().create_task(asyncio.sleep(3600))

    async def generate(self) -> None: ...

    async def collective_rpc(self) -> None: ...

    async def call_utility_all_async(self, name: str, *args: Any) -> list[Any]:
        match name:
            case "collective_rpc":
                return [[self.worker.session.call(args[2][0])]]
            case "is_scheduler_paused":
                return [self.paused]
            case "reset_prefix_cache":
                return [True]
            case _:
                return [{"busy": True}]

    async def pause_scheduler_async(self, **_: Any) -> None:
        self.paused = True

    async def resume_scheduler_async(self) -> None:
        self.paused = False

    async def set_weight_version_async(self, _: str) -> None: ...

    async def update_weight_version(self, _: str) -> None: ...


class Holder:
    """A user's class, which knows nothing of us."""

    def __init__(self) -> None:
        self.step, self.model = 0, ToyLLM()

    def holds(self, seed: int) -> bool:
        return self.model.worker.holds(seed)


class AsyncHolder:
    async def start(self) -> None:
        self.engine = ToyAsyncLLM()

    async def holds(self, seed: int) -> bool:
        return self.engine.worker.holds(seed) and not self.engine.paused


class IsOne(ToyLLM):
    def holds(self, seed: int) -> bool:
        return self.worker.holds(seed)


class Empty:
    def __init__(self) -> None:
        self.nothing = 1


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20,
        log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield
    ray.shutdown()


def test_actors_that_hold_an_llm_or_an_async_llm(local: None) -> None:
    actors = [ray.remote(c).options(num_cpus=0).remote() for c in (Holder, AsyncHolder, IsOne)]
    ray.get(actors[1].start.remote())
    first, second = toys.checkpoint(Model(), 2), toys.checkpoint(Model(), 3)
    with WeightSync(actors) as sync:
        report = sync.push(first, version="one")
        assert [o.version for o in report.replicas] == ["one"] * 3
        assert all(ray.get([a.holds.remote(2) for a in actors]))
        sync.push(second)
        assert all(ray.get([a.holds.remote(3) for a in actors]))
        assert sync.verify().ok
        assert [s["state"] for s in sync.status()] == ["IDLE"] * 3
        with pytest.raises(PlanError, match=r"model\.extra") as error:
            sync.push(first | {"model.extra": first[next(iter(first))]})
        assert error.value.where.startswith("actor ")
        assert all(ray.get([a.holds.remote(3) for a in actors]))
    with WeightSync(actors[:2], packed=True, buffer_bytes=1024) as sync:
        sync.push(first)
        assert all(ray.get([a.holds.remote(2) for a in actors[:2]]))
    ray.kill(actors[0])
    with WeightSync(actors[0]) as sync, pytest.raises(ServerUnreachable, match="push"):
        sync.push(first)


def test_an_actor_without_an_engine(local: None) -> None:
    actor = ray.remote(Empty).options(num_cpus=0).remote()
    with WeightSync(actor) as sync, pytest.raises(RequestError, match="Empty holds 0 engines"):
        sync.push(toys.checkpoint(Model(), 2))
