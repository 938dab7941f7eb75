"""Engines a benchmark pushes to: an API server of its own, or an LLM with its engine process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

START_S = 400.0


@contextmanager
def server(
    model: Path,
    backend: str,
    port: int,
    log: Path,
    *,
    memory: float,
    gpus: str | None = None,
    args: tuple[str, ...] = (),
) -> Iterator[str]:
    """A server on loopback with dummy weights; yields its URL at once: `wait_ready` waits.

    The environment lets vLLM's own HTTP client in (dev mode, pickled handles), so that both
    backends run alike.
    """  # fmt: skip
    env = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "VLLM_PLUGINS": "wt", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    if gpus is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpus
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port),
        "--load-format", "dummy", "--skip-tokenizer-init", "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "16", "--max-num-batched-tokens", "2048",
        "--dtype", "bfloat16",
        "--gpu-memory-utilization", str(memory), "--kv-cache-memory-bytes", str(1 << 30),
        "--weight-transfer-config", f'{{"backend": "{backend}"}}', *args,
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            cwd=log.parent,
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def wait_ready(url: str, log: Path) -> None:
    """Block until /health answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"{url} did not start:\n{log.read_text(errors='replace')[-3000:]}")


def check_pynccl(group: Any) -> None:
    """Raise unless vLLM's own communicator sends anything: where it cannot load NCCL, or one older
    than it asks for, it is off and says nothing (`gpu_machine.sh` has a way out)."""
    if group.disabled:
        raise RuntimeError("vLLM's PyNccl is off here: set VLLM_NCCL_SO_PATH")


def tokens(url: str) -> list[int]:
    """Greedy token ids after a fixed prompt."""
    body = {"model": "m", "prompt": [5, 6, 7, 8], "max_tokens": 12, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True, "detokenize": False}  # fmt: skip
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False)
    answer.raise_for_status()
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def llm(model: Path, backend: str, *, memory: float, **options: Any) -> Any:
    """An offline LLM, its engine in a process of its own unless the environment says otherwise."""
    from vllm import LLM

    return LLM(
        model=str(model), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=512, max_num_seqs=16, max_num_batched_tokens=2048, dtype="bfloat16",
        gpu_memory_utilization=memory,
        kv_cache_memory_bytes=1 << 30, weight_transfer_config={"backend": backend}, **options,
    )  # fmt: skip
