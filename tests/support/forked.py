"""vLLM's processes, forked from one that has imported vLLM and done nothing else.

On a CPU vLLM spawns a server's engine core and workers, and each of the three imports all of vLLM
anew (so does one more process per architecture, only to look at its class): 50 s of CPU time,
where the start itself takes 5. Forked, everything behind the imports is
the same: vLLM's own `main`, processes of their own, plugins found and loaded by each. OpenMP has
read its settings by then (one thread, tests/conftest.py).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
VLLM = "tests.support.forked_imports"
_ahead = ["torch._dynamo", "uvicorn", "fastapi", "tests.support.toy_replica"]
Pipe = _CONTEXT.Pipe
MODULE = "vllm.entrypoints.openai.api_server"


def expect_vllm() -> None:
    """Import vLLM ahead. A test process has one server of forks for all its tests, which imports
    when it is first needed, by whichever of them."""
    _ahead[:] = [VLLM]


def forked(target: Callable[..., None], *args: object) -> BaseProcess:
    """`target`, running in a process forked from one that has imported everything: torch alone
    takes seconds."""
    _CONTEXT.set_forkserver_preload(_ahead)
    process = _CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def start(
    target: Callable[..., None], *args: Any, env: Mapping[str, str], log: Path
) -> BaseProcess:
    """Run `target(*args)` in a process and session of its own, with exactly this environment, in
    the folder of the `log` that its output is appended to."""
    expect_vllm()
    _CONTEXT.set_forkserver_preload(_ahead)
    process = _CONTEXT.Process(target=_become, args=(target, args, dict(env), log))
    process.start()
    return process


def api_server(*args: str) -> None:
    """`python -m vllm.entrypoints.openai.api_server ARGS`."""
    fork_engines()
    sys.argv = [MODULE, *args]
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


def api_server_anew(*args: str) -> None:
    """The same as users start it: by a fresh interpreter, with vLLM's way to make processes."""
    os.execv(sys.executable, [sys.executable, "-m", MODULE, *args])


def fork_engines() -> None:
    """vLLM's CPU platform asks for spawned engine cores and workers; fork them instead."""
    importlib.import_module(VLLM)  # where it was not expected
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and hasattr(module, "get_mp_context"):
            module.get_mp_context = lambda: multiprocessing.get_context("fork")
    registry = sys.modules["vllm.model_executor.models.registry"]
    registry._run_in_subprocess = lambda look: look()  # type: ignore[attr-defined]


def _become(
    target: Callable[..., None], args: tuple[Any, ...], env: dict[str, str], log: Path
) -> None:
    os.setsid()
    with log.open("ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(log.parent)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    # What it leaves in /dev/shm is swept when it ends, as any server's, not when pytest does.
    resource_tracker._resource_tracker._fd = None  # type: ignore[attr-defined]
    target(*args)
