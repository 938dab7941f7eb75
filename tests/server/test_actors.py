"""Real engines in Ray actors: pushed to through Ray, by shared memory and by one broadcast; by our
trainer, and by vLLM's unmodified Ray client."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_dropin import gloo, update
from tests.support import models, offline
from tests.support.ports import free_port
from tests.support.server import vllm_env
from vllm_wt_plugin import WeightSync

ray: Any = pytest.importorskip("ray")
pytestmark = [pytest.mark.server, pytest.mark.full]
__all__ = ["gloo"]  # a fixture
ROOT = str(Path(__file__).parents[2])


class Holder:
    """A user's class, which knows nothing of us."""

    def __init__(self, model: str) -> None:
        self.llm = offline.engine(model)

    def answers(self) -> offline.Answers:
        return offline.ask(self.llm)


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    paths = os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")])
    env = vllm_env({"PYTHONPATH": paths, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    changed = {k: v for k, v in env.items() if os.environ.get(k) != v}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20,
        log_to_driver=False, configure_logging=False, runtime_env={"env_vars": changed},
    )  # fmt: skip
    yield
    ray.shutdown()


def test_two_engines_take_what_a_fresh_one_has(
    local: None, checkpoint: Callable[..., Path]
) -> None:
    folders = [checkpoint("qwen3", seed) for seed in (0, 1)]
    holder = ray.remote(Holder).options(num_cpus=1)
    actors = [holder.remote(str(f)) for f in folders]
    fresh = ray.get([a.answers.remote() for a in actors], timeout=300)
    assert offline.differences(fresh[0], fresh[1])
    for options in ({"backend": "nccl", "buffer_bytes": 64 << 10}, {"backend": "ipc"}):
        with WeightSync(actors, **options) as sync:
            for seed in (1, 0):
                report = sync.push(folders[seed], version=f"seed {seed}")
                assert [r.version for r in report.replicas] == [f"seed {seed}"] * 2
                for said in ray.get([a.answers.remote() for a in actors], timeout=300):
                    assert offline.differences(said, fresh[seed]) == [], options
            assert sync.verify().ok


@pytest.mark.usefixtures("local", "gloo")
def test_vllms_ray_client(checkpoint: Callable[..., Path]) -> None:
    """To actors that are vLLM's own `LLM`, as its examples make them: handles for both, then its
    nccl trainer class (gloo in the place of its communicator) for the one that is served so."""
    from vllm import LLM
    from vllm.distributed.weight_transfer import RayVLLMWeightSyncClient, factory, nccl_engine
    from vllm.distributed.weight_transfer.base import ModuleSource

    kind = ray.remote(LLM).options(num_cpus=1)
    ipc, nccl = actors = [
        kind.remote(str(checkpoint("qwen3", seed)), **offline.options(backend=backend))
        for seed, backend in ((3, "ipc"), (1, "nccl"))
    ]

    def answers(*of: Any) -> list[offline.Answers]:
        said: list[offline.Answers] = ray.get(
            [a.__ray_call__.remote(offline.ask) for a in of], timeout=300
        )
        return said

    fresh = dict(zip((3, 1), answers(*actors), strict=True))
    assert offline.differences(fresh[3], fresh[1])
    update(RayVLLMWeightSyncClient(actors), 1, "v1")
    for said in answers(*actors):
        assert offline.differences(said, fresh[1]) == []
    trainer = factory.WeightTransferTrainerFactory.trainer_init(
        nccl_engine.NCCLTrainerInitInfo(
            rank=0, master_address="127.0.0.1", master_port=free_port(), world_size=2, packed=False
        ),
        client=RayVLLMWeightSyncClient(nccl),
        source=ModuleSource(models.build("qwen3", 3)),
    )
    for _ in range(2):
        trainer.send_weights()
    trainer.shutdown()
    assert offline.differences(answers(nccl)[0], fresh[3]) == []
    assert offline.differences(answers(ipc)[0], fresh[1]) == []
