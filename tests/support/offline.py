"""Offline `LLM` engines in a process of their own, and what every engine is asked in the tests.

One process builds one engine after another (1 to 2 s each), asks it PROBES, and drops it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support import forked
from tests.support.server import vllm_env

# The last one fills a block of the CPU's prefix cache (128 tokens): asked again, it is answered
# from the cache, so old keys and values that a push left there show. Asking for the log-probs of
# a prompt bypasses that cache, so only the others do.
PROBES: list[list[int]] = [
    [5, 6, 7, 8],
    list(range(20, 60)),
    [100, 3, 100, 3, 100],
    [(7 * i) % 250 + 3 for i in range(150)],
    [(11 * i) % 250 + 3 for i in range(200)],
]
CACHED = len(PROBES) - 1
TOKENS = 16
REPLY_S = 300.0
Answers = list[dict[str, Any]]  # per probe: token ids, their log-probs, the top ones, the prompt's


def differences(got: Answers, want: Answers) -> list[str]:
    """Where two answers differ in any bit, in few words (the answers fill pages)."""
    pairs = enumerate(zip(got, want, strict=True))
    return [f"probe {i}: {key}" for i, (a, b) in pairs for key in b if a[key] != b[key]]


def ask_server(server: Any) -> Answers:
    """PROBES, one request after another (a batch has other bits), from a `Server`."""
    out: Answers = []
    for i, prompt in enumerate(PROBES):
        options = {} if i == CACHED else {"prompt_logprobs": 1}
        response = server.complete(
            prompt, logprobs=2, ignore_eos=True, return_tokens_as_token_ids=True, **options
        )
        response.raise_for_status()
        choice = response.json()["choices"][0]
        top, ids = choice["logprobs"]["top_logprobs"], choice["logprobs"]["tokens"]
        out.append(
            {
                "tokens": [_id(t) for t in ids],
                "logprobs": choice["logprobs"]["token_logprobs"],
                "top": [{str(_id(t)): v for t, v in row.items()} for row in top],
                "prompt": [
                    {t: v["logprob"] for t, v in row.items()}
                    for row in (choice["prompt_logprobs"] or [])[1:]
                ],
            }
        )
    return out


def _id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


class Offline:
    """Driver of the other process. One engine at a time; `log` has what vLLM prints.

    `in_process`: the worker lives in the process of the `LLM` object, else in others.
    """

    def __init__(
        self,
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        tp: int = 1,
        in_process: bool = True,
    ) -> None:
        self.log = log
        self._env = vllm_env(env)
        self._env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
        self._tp = tp
        self._fresh: dict[Path, Answers] = {}

    def start(self) -> Self:
        self._pipe, theirs = forked.Pipe()
        self.process = forked.start(serve, theirs, env=self._env, log=self.log)
        theirs.close()
        return self

    def fresh(self, model: Path) -> Answers:
        """What an engine says that has just loaded this checkpoint."""
        if model not in self._fresh:
            self._fresh[model] = self._call(op="fresh", model=str(model))
        return self._fresh[model]

    def push(self, model: Path, sources: Iterable[tuple[str, Path]]) -> list[dict[str, Any]]:
        """Start from `model`, ask, then push each source and ask again.

        A source is (`folder` | `module` | `fp32`, checkpoint); the latter two are pushed as
        transformers' model object. One row per source: `answers`, `report` (a PlanReport);
        the first row is the engine before any push.
        """
        rows = [(how, str(path)) for how, path in sources]
        result: list[dict[str, Any]] = self._call(op="push", model=str(model), sources=rows)
        return result

    def lifecycle(self, model: Path, source: Path) -> dict[str, Any]:
        """Start from `model`; bring `source` in by the methods that vLLM gives an `LLM`."""
        rows = [("folder", str(source))]
        result: dict[str, Any] = self._call(op="lifecycle", model=str(model), sources=rows)
        return result

    def _call(self, **request: Any) -> Any:
        if not self.process.is_alive():  # ended after an error: begin anew
            self.start()
        self._pipe.send(request | {"tp": self._tp})
        try:
            reply = self._pipe.recv() if self._pipe.poll(REPLY_S) else {"error": "no reply"}
        except EOFError:
            reply = {"error": "the process died"}
        if "error" in reply:
            self.stop()
            raise RuntimeError(f"{request}: {reply['error']}\n{self.text()[-4000:]}")
        return reply["ok"]

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        """Idempotent; ends the whole process group at once (vLLM's own exit takes seconds)."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join(20)
        self._pipe.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


# ---- in the other process ------------------------------------------------------------------


def options(tp: int = 1, backend: str = "ipc") -> dict[str, Any]:
    """What every engine here is made with, beside its model."""
    return {
        "weight_transfer_config": {"backend": backend}, "enforce_eager": True,
        "max_model_len": 256, "dtype": "bfloat16", "tensor_parallel_size": tp,
    }  # fmt: skip


def engine(model: str, tp: int = 1) -> Any:
    from vllm import LLM

    return LLM(model, **options(tp))


def ask(llm: Any) -> Answers:
    from vllm import SamplingParams

    out: Answers = []
    for i, prompt in enumerate(PROBES):
        params = SamplingParams(
            temperature=0, max_tokens=TOKENS, logprobs=2, ignore_eos=True,
            prompt_logprobs=None if i == CACHED else 1,
        )  # fmt: skip
        request = {"prompt_token_ids": prompt}
        result = llm.generate(request, params, use_tqdm=False)[0]
        said = result.outputs[0]
        out.append(
            {
                "tokens": list(said.token_ids),
                "logprobs": [
                    row[t].logprob for t, row in zip(said.token_ids, said.logprobs, strict=True)
                ],
                "top": [_plain(row) for row in said.logprobs],
                "prompt": [_plain(row) for row in (result.prompt_logprobs or [])[1:]],
            }
        )
    return out


def _plain(row: Mapping[int, Any]) -> dict[str, float]:
    return {str(t): v.logprob for t, v in row.items()}


def _source(how: str, path: str) -> Any:
    if how == "folder":
        return Path(path)
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if how == "fp32" else "auto"
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).requires_grad_(False)


def _push(llm: Any, sources: list[Any]) -> list[dict[str, Any]]:
    import msgspec

    from vllm_wt_plugin import WeightSync

    rows: list[dict[str, Any]] = [{"answers": ask(llm), "report": None}]
    with WeightSync(llm) as sync:
        for source in sources:
            report = sync.push(source)
            plan = msgspec.to_builtins(report.replicas[0].plan)
            rows.append({"answers": ask(llm), "report": plan})
    return rows


def _lifecycle(llm: Any, folder: Path) -> dict[str, Any]:
    """Every method of vLLM's, in and out of turn; then an update in two parts."""
    from vllm_wt_plugin.trainer.source import as_source
    from vllm_wt_plugin.transport.ipc import Exporter

    def error(call: Any, *args: Any) -> str:
        try:
            call(*args)
        except Exception as exc:
            return f"{type(exc).__name__}: {exc}"
        return ""

    def phase() -> str:
        from vllm_wt_plugin.trainer.client import LLMClient

        return str(LLMClient(llm).status()["state"])

    said: dict[str, Any] = {"before": ask(llm)}
    llm.init_weight_transfer_engine({"init_info": {"packed": False}})
    said["draft"] = error(llm.start_draft_weight_update)
    said["too early"] = error(llm.update_weights, {"update_info": {}})
    llm.start_weight_update()
    said["nonsense"] = error(llm.update_weights, {"update_info": {"names": 5}})
    said["too late"] = error(llm.finish_weight_update)
    said["after nonsense"], said["still"] = phase(), ask(llm)
    with Exporter() as exporter:
        table, _ = exporter.register(as_source(folder))
        exporter.refresh()
        llm.start_weight_update()
        for rows in (table.tensors[:5], table.tensors[5:]):
            llm.update_weights({"update_info": {
                "names": [r.name for r in rows], "dtype_names": [r.dtype for r in rows],
                "shapes": [list(r.shape) for r in rows],
                "storages": [{"kind": "shm", "name": s.name, "nbytes": s.nbytes}
                             for s in table.storages],
                "handles": [(r.storage, r.offset, r.stride) for r in rows],
            }})  # fmt: skip
        llm.finish_weight_update("v2")
        if hasattr(llm, "shutdown_weight_transfer_engine"):  # vLLM >= 0.32
            llm.shutdown_weight_transfer_engine()
    from vllm_wt_plugin.trainer.client import LLMClient

    said["workers"] = LLMClient(llm).status()["version"]
    return said | {"after": ask(llm), "version": llm.get_weight_version()}


def _handle(request: dict[str, Any]) -> Any:
    # Before the engine: vLLM changes the classes of models that it runs by transformers' code.
    sources = [_source(how, path) for how, path in request.get("sources", [])]
    llm = engine(request["model"], request["tp"])
    try:
        if request["op"] == "lifecycle":
            return _lifecycle(llm, sources[0])
        return ask(llm) if request["op"] == "fresh" else _push(llm, sources)
    finally:
        shutdown = getattr(llm.llm_engine.engine_core, "shutdown", None)
        if shutdown is not None:
            shutdown()


def serve(pipe: Connection) -> None:
    """Answer requests until the other end closes."""
    forked.fork_engines()
    with contextlib.suppress(EOFError):
        while True:
            request, start = pipe.recv(), time.perf_counter()
            try:
                reply: dict[str, Any] = {"ok": _handle(request)}
            # Whatever went wrong, the test is to see it.
            except Exception as exc:
                reply = {"error": f"{type(exc).__name__}: {exc}"}
                sys.excepthook(type(exc), exc, exc.__traceback__)
            gc.collect()
            print(f"took {time.perf_counter() - start:.1f} s: {request}", file=sys.stderr)
            pipe.send(reply)
