"""A real `vllm` API server on loopback, in a process group of its own that ends with it."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.support import forked
from tests.support.ports import free_port

START_S = 240.0
MACHINE = {  # what it lacks, not what is tested
    "VLLM_USE_FLASHINFER_SAMPLER", "VLLM_NCCL_SO_PATH", "VLLM_WORKER_MULTIPROC_METHOD",
}  # fmt: skip
PROMPTS: list[list[int]] = [[5, 6, 7, 8], list(range(20, 60)), [100, 3, 100, 3, 100]]
Generation = tuple[list[str], list[float]]  # tokens and their log-probs


def vllm_env(
    extra: Mapping[str, str] | None = None, *, plugins: str | None = "wt"
) -> dict[str, str]:
    """The environment of every vLLM process in the tests.

    How many threads compute changes bits, so every engine that is compared gets one, unbound.
    """
    env = {
        k: v for k, v in os.environ.items()
        if k in MACHINE or not k.startswith(("WT_", "VLLM_"))
    }  # fmt: skip
    env |= {
        "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    return env | dict(extra or {})


class Server:
    """Started by `with`; `log` has what it printed. `args` follow the model's own.

    `anew`: by a fresh interpreter, as users start it (50 s instead of 5, see `forked`).
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        *,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        plugins: str | None = "wt",
        tp: int = 1,
        backend: str | None = "ipc",
        anew: bool = False,
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self._args = [
            "--model", str(model), "--served-model-name", "m", "--host", "127.0.0.1",
            "--port", str(self.port), "--enforce-eager", "--max-model-len", "256",
            "--dtype", "bfloat16", "--tensor-parallel-size", str(tp), *args,
        ]  # fmt: skip
        if backend is not None:
            self._args += ["--weight-transfer-config", f'{{"backend": "{backend}"}}']
        self._env = vllm_env(env, plugins=plugins)
        self._main = forked.api_server_anew if anew else forked.api_server
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def start(self) -> Self:
        """Blocks until /health answers; raises with the log's end if the server dies."""
        self.process = forked.start(self._main, *self._args, env=self._env, log=self.log)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if not self.process.is_alive():
                raise RuntimeError(f"the server died:\n{self.text()[-4000:]}")
            try:
                if self.http.get("/health").status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        self.stop()
        raise TimeoutError(f"no /health in {START_S} s:\n{self.text()[-4000:]}")

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Idempotent; ends the server's whole process group."""
        self.http.close()
        pid = self.process.pid
        assert pid is not None
        self.process.terminate()
        self.process.join(20)
        with contextlib.suppress(ProcessLookupError):
            for _ in range(100):  # engine and workers clean /dev/shm after their leader has gone
                os.killpg(pid, 0)
                time.sleep(0.1)
            os.killpg(pid, signal.SIGKILL)
        self.process.join(20)

    def signal(self, number: int) -> None:
        """To the whole group. After SIGKILL, `start` brings it back at the same address."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.join(20)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()

    def complete(self, prompt: list[int] | str, **options: Any) -> httpx.Response:
        body = {"model": "m", "prompt": prompt, "max_tokens": 16, "temperature": 0, **options}
        return self.http.post("/v1/completions", json=body)

    def generations(self) -> list[Generation]:
        """Greedy tokens and log-probs for PROMPTS, one after another (batching changes bits),
        after dropping nothing: the prefix cache is the server's own business."""
        out = []
        for prompt in PROMPTS:
            response = self.complete(prompt, logprobs=2, ignore_eos=True)
            response.raise_for_status()
            logprobs = response.json()["choices"][0]["logprobs"]
            out.append((logprobs["tokens"], logprobs["token_logprobs"]))
        return out

    def status(self) -> dict[str, Any]:
        data: dict[str, Any] = self.http.get("/weight_transfer_status").json()
        return data
