"""Reaching an engine that a Ray actor holds. Ray is imported only when a target is an actor."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from typing import Any

import msgspec

from vllm_wt_plugin.errors import ServerUnreachable, WeightSyncError, from_dict
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.replies import Held

POLL_S = 0.001
_PUSHES = {msg.PushRequest: "push", PatchPush: "patch", msg.BroadcastPush: "broadcast"}


def is_actor(target: Any) -> bool:
    """Who has a handle of an actor has imported Ray."""
    actor = sys.modules.get("ray.actor")
    return actor is not None and isinstance(target, actor.ActorHandle)


def _ask(actor: Any, what: str, payload: bytes) -> Any:
    """Runs in the actor, where this package and vLLM are installed."""
    return importlib.import_module("vllm_wt_plugin.actor").ask(actor, what, payload)


class ActorClient:
    """One replica: the `LLM` or `AsyncLLM` that a Ray actor of any class is, or has as attribute.

    An actor that holds an `AsyncLLM` has async methods, and serves on while it is pushed to; one
    that holds an `LLM` must not generate meanwhile. Blocking; `timeout_s` bounds each answer.
    """

    aside = False  # one that holds an `LLM` does one thing at a time

    def __init__(self, actor: Any, *, timeout_s: float) -> None:
        self._actor, self._timeout_s = actor, timeout_s
        self.name = f"actor {actor._actor_id.hex()}"

    def push(self, request: msg.Push, sent: Callable[[], object] = lambda: None) -> Outcome:
        return msgspec.convert(self._call(_PUSHES[type(request)], request), Outcome)

    def checksums(self, specs: tuple[ParamSpec, ...] = ()) -> Held:
        return msgspec.convert(self._call("checksums", specs), Held)

    def join(self, info: dict[str, Any]) -> None:
        self._call("join", info)

    def start(self, body: msg.StartBody) -> tuple[str, msg.PlanReport | None]:
        return msgspec.convert(self._call("start", body), tuple[str, msg.PlanReport | None])

    def bucket(self, session: str, index: int) -> dict[str, float]:
        seconds: dict[str, float] = self._call("bucket", session, index)
        return seconds

    def receive(self, session: str) -> dict[str, float]:
        seconds: dict[str, float] = self._call("receive", session)
        return seconds

    def finish(self, body: msg.FinishBody) -> Outcome:
        return msgspec.convert(self._call("finish", body), Outcome)

    def abort(self, session: str, reason: str) -> None:
        self._call("abort", session, reason)

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self._call("status")
        return status

    def shutdown(self) -> None:
        self._call("shutdown")

    def close(self) -> None:
        """The actor is its owner's."""

    def _call(self, what: str, *args: Any) -> Any:
        import ray

        deadline = time.monotonic() + self._timeout_s
        payload = msgspec.msgpack.encode(args)
        try:
            answer: Any = what
            while isinstance(answer, str):  # an async actor's answer is asked for until it is there
                if answer != what:
                    time.sleep(POLL_S)
                left = max(0.0, deadline - time.monotonic())
                reply = self._actor.__ray_call__.remote(_ask, answer, payload)
                answer, payload = ray.get(reply, timeout=left), b""
        except ray.exceptions.RayError as exc:
            lines = [line for line in str(exc).strip().splitlines() if line.strip()]
            error = ServerUnreachable(
                f"{what}: {type(exc).__name__}: {lines[-1].strip() if lines else ''}",
                where=self.name,
                next_step="see whether the actor lives and is free, and has this package installed",
            )
            error.heard = isinstance(exc, ray.exceptions.GetTimeoutError)
            raise error from exc
        said = msgspec.msgpack.decode(answer)
        if "error" in said:
            refused: WeightSyncError = from_dict(said["error"])
            refused.where = f"{self.name}{': ' if refused.where else ''}{refused.where}"
            raise refused
        return said["ok"]
