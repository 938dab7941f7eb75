"""The demo, as a new user runs it: it checks itself, and it leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.server


@contextmanager
def started(out: Path, name: str = "rl_loop.py", *args: str) -> Iterator[subprocess.Popen[str]]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WT_", "VLLM_"))}
    demo = subprocess.Popen(
        [sys.executable, str(EXAMPLES / name), "--out", str(out), *args],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
        # Whoever runs the tests in the background has them ignore SIGINT, and children inherit it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with demo:
        try:
            yield demo
        finally:
            demo.terminate()  # does nothing to one that has ended


def living_in(folder: Path) -> list[str]:
    """Processes whose working directory is `folder`: the demo's server and its children."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append(f"{process.name} {(process / 'comm').read_text().strip()}")
        except OSError:
            pass  # it ended, or is not ours
    return found


def test_demo_learns_and_serves_what_it_pushed(tmp_path: Path) -> None:
    with started(tmp_path) as demo:
        text, _ = demo.communicate(timeout=400)
    assert demo.returncode == 0, text
    *_, last_row, verdict = text.splitlines()
    assert last_row.split()[0] == "end"
    assert verdict.startswith("ok: ")
    assert (tmp_path / "rl_loop.png").read_bytes().startswith(b"\x89PNG")
    assert living_in(tmp_path) == []


@pytest.mark.full
def test_the_same_on_one_copy_of_the_weights(tmp_path: Path) -> None:
    with started(tmp_path, "one_copy_training.py") as demo:
        text, _ = demo.communicate(timeout=400)
    assert demo.returncode == 0, text
    assert text.splitlines()[-1].startswith("ok: 25 of 25 parameters are vLLM's own memory")
    assert (tmp_path / "vllm_bridge_config.json").stat().st_mode & 0o777 == 0o600
    assert living_in(tmp_path) == []


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)]
)
def test_interrupted_demo_leaves_no_server(tmp_path: Path, number: signal.Signals) -> None:
    with started(tmp_path) as demo:
        deadline = time.monotonic() + 180
        while not living_in(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(3)  # into vLLM's imports
        demo.send_signal(number)
        text, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, text
    assert "interrupted" in text.splitlines()[-1]
    assert living_in(tmp_path) == []


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "ray"])
def test_fsdp_ranks_push_to_the_workers_beside_them(tmp_path: Path, launcher: str) -> None:
    """Two FSDP2 ranks of an MoE, two workers, each fed by a rank of its own."""
    with started(tmp_path, "fsdp_ep_ipc.py", "--launcher", launcher) as example:
        text, _ = example.communicate(timeout=560)
    assert example.returncode == 0, text
    assert text.splitlines()[-1].startswith("ok: 2 pushes of 2 FSDP ranks")
    assert living_in(tmp_path) == []
