"""Real engines in Ray actors: pushed to through Ray, by shared memory and by one broadcast."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import offline
from tests.support.server import vllm_env
from vllm_wt_plugin import WeightSync

ray: Any = pytest.importorskip("ray")
pytestmark = [pytest.mark.server, pytest.mark.full]
ROOT = str(Path(__file__).parents[2])


class Holder:
    """A user's class, which knows nothing of us."""

    def __init__(self, model: str) -> None:
        self.llm = offline._llm(model, 1)

    def answers(self) -> offline.Answers:
        return offline._ask(self.llm)


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
