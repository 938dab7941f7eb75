"""The command line and the metrics, against a real server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import fleet
from tests.support.server import Server

pytestmark = pytest.mark.server


@pytest.fixture
def server(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Server:
    return fleet.plain(serve, checkpoint)


def run(*args: object) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "vllm_wt_plugin.cli", *map(str, args), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_the_command_line(server: Server, checkpoint: Callable[..., Path]) -> None:
    """On a CPU vLLM packs what it can: what is left to compare must be equal, or differ by name."""
    one, two = checkpoint("qwen3", 1), checkpoint("qwen3", 2)
    code, pushed = run("push", two, server.url, "--version", "two")
    assert (code, pushed["servers"][server.url]["version"]) == (0, "two"), pushed
    assert run("verify", two, server.url)[0] == 0
    code, found = run("verify", one, server.url)
    assert (code, "model.norm.weight" in found["differ"][server.url]) == (1, True)
    code, pushed = run("push", one, server.url, "--sparse-from", two, "--version", "one")
    assert (code, pushed["changed"] is not None) == (0, True)
    code, found = run("status", server.url)
    last = found["servers"][server.url]["last_push"]
    assert (code, last["kind"], last["version"]) == (0, "sparse", "one")
    fleet.assert_serves(server, 1, "one")
    code, found = run("doctor", server.url)
    assert (code, found["ok"]) == (0, True), found


def test_metrics_are_vllms_own(server: Server) -> None:
    fleet.push(server, 1, "counted")
    text = server.http.get("/metrics").text
    assert 'vllm_wt_version_info{version="counted"} 1.0' in text
    assert 'vllm_wt_state{state="IDLE"} 1.0' in text
    assert 'vllm_wt_pushes_total{kind="dense"}' in text
    assert "vllm:num_requests_running" in text


@pytest.mark.full
def test_the_benchmark() -> None:
    """One small model, one round: an engine in a process, and the bits of both ways."""
    code, found = run("bench", "--sizes", "2M", "--rounds", "1")
    assert (code, found["ok"]) == (0, True), found
    (one,) = found["sizes"]
    assert one["processed"] == 0
    assert len(one["rows"]) == 6
    assert all(len(ms) == 1 and ms[0] > 0 for ms in one["rows"].values())
