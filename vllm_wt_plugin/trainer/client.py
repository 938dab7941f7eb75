"""Reaching one replica: a server over HTTP, or an `LLM` object in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec

from vllm_wt_plugin.errors import (
    RequestError,
    ServerUnreachable,
    TransferError,
    WeightSyncError,
    from_dict,
)
from vllm_wt_plugin.trainer.actors import ActorClient, is_actor
from vllm_wt_plugin.trainer.connections import Connections
from vllm_wt_plugin.wire import broadcast, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.replies import Held, held

logger = logging.getLogger(__name__)
_PUSHES = {
    msg.PushRequest: "/push_weights",
    PatchPush: "/push_patches",
    msg.BroadcastPush: "/push_broadcast",
}
_JSON = {"Content-Type": "application/json"}


class Client(Protocol):
    """One replica. Blocking; raises WeightSyncError with the replica's own words.

    `aside`: it takes an abort while it does something else.
    """

    name: str
    aside: bool

    def push(self, request: msg.Push, sent: Callable[[], object] = ...) -> Outcome:
        """`sent` is called when the request is on its way, if the replica takes others `aside`."""

    def checksums(self, specs: tuple[ParamSpec, ...] = ()) -> Held: ...

    def join(self, info: dict[str, Any]) -> None: ...

    def start(self, body: msg.StartBody) -> tuple[str, msg.PlanReport | None]: ...

    def receive(self, session: str) -> dict[str, float]: ...

    def bucket(self, session: str, index: int) -> dict[str, float]: ...

    def finish(self, body: msg.FinishBody) -> Outcome: ...

    def abort(self, session: str, reason: str) -> None: ...

    def status(self) -> dict[str, Any]: ...

    def shutdown(self) -> None: ...

    def close(self) -> None: ...


class HTTPClient:
    """A `vllm serve` with this plugin. Thread-safe.

    `timeout_s` bounds each wait on the socket; `token` goes out as a bearer token and into no log.
    """

    aside = True

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = 300.0) -> None:
        self.name = url.rstrip("/")
        self._connections = Connections(self.name, timeout_s)
        self._headers: dict[str, str] = {}
        if token:
            if not (token.isascii() and token.isprintable()):  # the text of it is for no message
                raise RequestError(
                    "the token has characters that no header can hold", where="token",
                    next_step="use printable ASCII, without the line's end of the file it is from",
                )  # fmt: skip
            self._headers["Authorization"] = f"Bearer {token}"

    def push(self, request: msg.Push, sent: Callable[[], object] = lambda: None) -> Outcome:
        path = _PUSHES[type(request)]
        return msgspec.convert(self._call("POST", path, request, sent), Outcome)

    def checksums(self, specs: tuple[ParamSpec, ...] = ()) -> Held:
        """What each rank's weights add up to; of these tensors, or those of the last update."""
        return msgspec.convert(self.post("/weight_checksums", {"specs": specs}), Held)

    def status(self) -> dict[str, Any]:
        return self._call("GET", "/weight_transfer_status")

    def shutdown(self) -> None:
        self.post("/shutdown_weight_transfer_engine", {})

    def post(self, path: str, body: object) -> dict[str, Any]:
        """POST `body` as JSON to one of the plugin's routes."""
        return self._call("POST", path, body)

    def get(self, path: str) -> dict[str, Any]:
        """GET one of the plugin's routes."""
        return self._call("GET", path)

    def start(self, body: msg.StartBody) -> tuple[str, msg.PlanReport | None]:
        """Open an update of several calls; its session, which they name, and the plan if new."""
        reply = self.post("/start_weight_update", body)
        return reply["session"], msgspec.convert(reply["report"], msg.PlanReport | None)

    def bucket(self, session: str, index: int) -> dict[str, float]:
        """Have every worker copy one bucket of the open update. Returns seconds by phase."""
        body = {"session": session, "update_info": {"bucket": index}}
        seconds: dict[str, float] = self.post("/update_weights", body)["seconds"]
        return seconds

    def join(self, info: dict[str, Any]) -> None:
        """Have every worker join the group that `info` tells of (`wire/nccl.py: NcclInit`)."""
        self.post("/init_weight_transfer_engine", {"init_info": info})

    def receive(self, session: str) -> dict[str, float]:
        """Have every worker take what is broadcast, to the end. Returns seconds by phase."""
        body = {"session": session, "update_info": {"broadcast": True}}
        seconds: dict[str, float] = self.post("/update_weights", body)["seconds"]
        return seconds

    def finish(self, body: msg.FinishBody) -> Outcome:
        """Commit the update that `start` opened."""
        answer = self.post("/finish_weight_update", body)
        answer.pop("message", None)
        return msgspec.convert(answer, Outcome)

    def abort(self, session: str, reason: str) -> None:
        """End this update as well as can be; what the server thinks of it is its state."""
        try:
            self.post("/abort_weight_update", {"session": session, "reason": reason[:4096]})
        except WeightSyncError as exc:
            logger.warning("the update could not be aborted, its lease will end it: %s", exc)

    def close(self) -> None:
        self._connections.close()

    def _call(
        self, method: str, path: str, body: object = None, sent: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        content = None if body is None else msgspec.json.encode(body)
        headers = self._headers if body is None else self._headers | _JSON
        return self._read(*self._connections.request(method, path, content, headers, sent), path)

    def _read(self, status: int, content: bytes, path: str) -> dict[str, Any]:
        try:
            data = msgspec.json.decode(content)
        except msgspec.DecodeError:
            data = None
        if status // 100 == 2 and isinstance(data, dict):
            return data
        if isinstance(data, dict) and "code" in data:
            error = from_dict(data)
            error.where = f"{self.name}{': ' if error.where else ''}{error.where}"
            raise error
        if status in (404, 405):
            raise ServerUnreachable(
                f"the server has no {path}",
                where=self.name,
                next_step="start it with VLLM_PLUGINS=wt and "
                """--weight-transfer-config '{"backend": "ipc"}'""",
            )
        raise TransferError(
            f"{path} answered {status}: " + content[:500].decode(errors="replace"),
            where=self.name,
        )


class LLMClient:
    """An offline `vllm.LLM`, driven by its `collective_rpc`. Not while it generates."""

    aside = False

    def __init__(self, llm: Any) -> None:
        self.name = "LLM"
        self._llm = llm
        # VLLM_ENABLE_V1_MULTIPROCESSING=0 with one worker: the client holds the core itself.
        core = getattr(llm.llm_engine.engine_core, "engine_core", None)
        executor = type(getattr(core, "model_executor", None)).__name__
        self.in_process = executor == "UniProcExecutor"
        parallel = llm.llm_engine.vllm_config.parallel_config
        if parallel.data_parallel_size > 1:
            raise RequestError(
                "an LLM object with data parallelism answers for its first engine only",
                next_step="use `vllm serve --data-parallel-size`, and its URL",
            )

    def checksums(self, specs: tuple[ParamSpec, ...] = ()) -> Held:
        return held(self._call(msg.Sums(specs=specs)), specs)

    def push(self, request: msg.Push, sent: Callable[[], object] = lambda: None) -> Outcome:
        if isinstance(request, msg.BroadcastPush):
            return self._run(broadcast.push(request))
        if isinstance(request, PatchPush):
            if request.form == "broadcast":
                return self._run(broadcast.push(request))
            request.check()
        elif request.register is not None:
            request.register.check()
        core = self._llm.llm_engine.engine_core
        payload, name = msgspec.msgpack.encode(request), exchange.core_method(request)
        # The core in this process, or vLLM's client of the core in another.
        row = (
            getattr(core.engine_core, name)(payload)
            if hasattr(core, "engine_core")
            else core.call_utility(name, payload)
        )
        reply = msgspec.convert(row, exchange.PushReply)
        if reply.busy:
            return self._run(exchange.push(request))
        if reply.outcome is None:
            raise from_dict(reply.error or {})
        return reply.outcome

    def join(self, info: dict[str, Any]) -> None:
        self._run(broadcast.join(info))

    def start(self, body: msg.StartBody) -> tuple[str, msg.PlanReport | None]:
        done = self._run(exchange.start(body))
        return done.session, done.report

    def bucket(self, session: str, index: int) -> dict[str, float]:
        return self._run(exchange.bucket(index, session)).seconds

    def receive(self, session: str) -> dict[str, float]:
        return self._run(broadcast.receive(session)).seconds

    def finish(self, body: msg.FinishBody) -> Outcome:
        return self._run(exchange.finish(body))

    def abort(self, session: str, reason: str) -> None:
        self._run(exchange.abort(msg.AbortBody(reason[:4096], session)))

    def _run(self, steps: exchange.Steps) -> Outcome:
        return exchange.run(steps, self._perform)

    def _perform(self, action: exchange.Action) -> Any:
        match action:
            case exchange.Call():
                return self._call(*action.verbs)
            case exchange.IsPaused():
                return True  # nothing runs between two calls of generate()
            case exchange.ResetCaches():
                return self._reset_caches()
            case exchange.SetVersion():
                return self._llm.llm_engine.set_weight_version(action.version)
            case exchange.Pause() | exchange.Resume() | exchange.Rest() | exchange.WatchLease():
                return None

    def _call(self, *verbs: msg.Verb) -> list[msg.Reply]:
        rows = self._llm.collective_rpc("weight_sync", args=(msg.encode_verbs(*verbs),))
        return [msgspec.convert(r, msg.Reply) for r in rows]

    def _reset_caches(self) -> None:
        exchange.must_reset(
            self._llm.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        )
        engine = self._llm.llm_engine
        if engine.model_config.is_multimodal_model:
            engine.reset_mm_cache()
            engine.reset_encoder_cache()

    def status(self) -> dict[str, Any]:
        replies = self._call(msg.Status(memory=True))
        agree(replies)
        data: dict[str, Any] = msgspec.to_builtins(replies[0].state)
        data["state"] = data.pop("phase")
        config = self._llm.llm_engine.vllm_config
        return data | {
            "registrations": replies[0].info["registrations"],
            "memory": [r.info["memory"] for r in replies],
            "world_size": len(replies),
            "device": config.device_config.device_type,
        }

    def shutdown(self) -> None:
        agree(self._call(msg.Shutdown()))

    def close(self) -> None:
        """Nothing of the LLM is ours."""


def tell_apart(clients: Iterable[Client]) -> None:
    """Give LLM objects names of their own. Raises RequestError for a replica given twice: what it
    holds is known by its name."""
    names = set[str]()
    for c in clients:
        if c.name in names and isinstance(c, LLMClient):
            c.name = f"{c.name} {len(names) + 1}"
        if c.name in names:
            raise RequestError("this replica is given twice", where=c.name)
        names.add(c.name)


def client_for(target: Any, *, token: str | None, timeout_s: float) -> Client:
    """A client for a URL, a Ray actor, or anything with `collective_rpc` (an LLM)."""
    if isinstance(target, str):
        return HTTPClient(target, token=token, timeout_s=timeout_s)
    if is_actor(target):
        return ActorClient(target, timeout_s=timeout_s)
    if hasattr(target, "collective_rpc") and hasattr(target, "llm_engine"):
        return LLMClient(target)
    raise RequestError(
        f"cannot reach {type(target).__name__}",
        next_step="give a server's URL, a vllm.LLM, a Ray actor that holds one, or a list of them",
    )
