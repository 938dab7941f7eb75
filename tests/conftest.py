"""Fixtures: checkpoints and servers, made once per configuration and kept for the session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # how many threads compute changes bits


def pytest_collection_finish(session: pytest.Session) -> None:
    from tests.support import forked

    if any(item.get_closest_marker("server") for item in session.items):
        forked.expect_vllm()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("qwen3", seed, tied=False)` → folder with weights and tokenizer."""
    from tests.support import models

    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, seed: int, *, tied: bool = False) -> Path:
        key = (kind, seed, tied)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{seed}{'-tied' if tied else ''}-")
            made[key] = models.save(models.build(kind, seed, tied=tied), folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`serve(model_folder, **options)` → a started `Server`, one per distinct set of arguments.

    Tests share it: leave it serving IDLE, awake and resumed.
    """
    from tests.support.server import Server

    running: dict[str, Server] = {}
    folder = tmp_path_factory.mktemp("servers")

    def get(model: Path, **options: Any) -> Server:
        key = repr((str(model), sorted(options.items())))
        if key not in running:
            server = Server(model, folder / f"server-{len(running)}.log", **options)
            running[key] = server.start()
        return running[key]

    yield get
    for server in running.values():
        server.stop()


@pytest.fixture(scope="session")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`offline(role, **options)` → a started `Offline`, one per distinct set of arguments."""
    from tests.support.offline import Offline

    running: dict[str, Offline] = {}
    folder = tmp_path_factory.mktemp("offline")

    def get(role: str, **options: Any) -> Offline:
        key = repr((role, sorted(options.items())))
        if key not in running:
            engine = Offline(folder / f"{role}-{len(running)}.log", **options)
            running[key] = engine.start()
        return running[key]

    yield get
    for engine in running.values():
        engine.stop()
