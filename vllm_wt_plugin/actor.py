"""Inside a Ray actor that holds an engine: answers for it, as a server or an `LLM` object would.

`trainer/actors.py` has Ray run `ask` in the actor, whatever its class: the engine is the actor
itself or an attribute of it. Arguments and answers are msgpack; an error is data.
"""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import Future
from typing import Any

import msgspec

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.server.control import EngineControl
from vllm_wt_plugin.server.routes import status_of
from vllm_wt_plugin.trainer.client import LLMClient
from vllm_wt_plugin.wire import broadcast, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.replies import Held, held

# What may be asked, and the arguments that it takes.
ASKED: dict[str, Any] = {
    "push": tuple[msg.PushRequest],
    "patch": tuple[PatchPush],
    "broadcast": tuple[msg.BroadcastPush],
    "checksums": tuple[tuple[ParamSpec, ...]],
    "join": tuple[dict[str, Any]],
    "start": tuple[msg.StartBody],
    "bucket": tuple[str, int],
    "receive": tuple[str],
    "finish": tuple[msg.FinishBody],
    "abort": tuple[str, str],
    "status": tuple[()],
    "shutdown": tuple[()],
}
_controls: dict[int, AsyncEngine] = {}  # by the id of their engine, which they keep alive
_coming: dict[str, Future[bytes]] = {}  # answers, by the ticket that was given for each


def ask(actor: Any, what: str, payload: bytes) -> bytes | str:
    """Answer one call; a str is to be asked for as `what` until the answer comes. Never raises."""
    if what in _coming:
        return _coming.pop(what).result() if _coming[what].done() else what
    try:
        engine = _engine_of(actor)
        if hasattr(engine, "llm_engine"):
            return _encoded(_call(LLMClient(engine), what, payload))
        control = _controls.setdefault(id(engine), AsyncEngine(engine))
        loop = _loop_of(engine)
    except Exception as exc:  # across the process border errors are data
        return _error(exc)
    # Ray runs this beside the actor's loop and awaits nothing; other calls must not wait for it.
    ticket = secrets.token_hex(16)
    coming = asyncio.run_coroutine_threadsafe(_answered(control, what, payload), loop)
    _coming[ticket] = coming
    return ticket


def _loop_of(engine: Any) -> asyncio.AbstractEventLoop:
    """The one that an AsyncLLM takes its outputs on, since it was made or first used in it."""
    if getattr(engine, "output_handler", None) is None:
        raise RequestError(
            "the AsyncLLM runs on no event loop yet",
            next_step="make it in an async method of the actor, or generate once",
        )
    loop: asyncio.AbstractEventLoop = engine.output_handler.get_loop()
    return loop


def _engine_of(actor: Any) -> Any:
    held = [actor] if _is_engine(actor) else vars(actor).values()
    found = {id(x): x for x in held if _is_engine(x)}
    if len(found) != 1:
        raise RequestError(
            f"the actor {type(actor).__name__} holds {len(found)} engines",
            next_step="have it be, or keep in one attribute, one vllm.LLM or AsyncLLM; an AsyncLLM "
            "in an actor whose methods are async",
        )
    return next(iter(found.values()))


def _is_engine(x: Any) -> bool:
    """An LLM or an AsyncLLM; not what is inside of them."""
    inside = hasattr(x, "llm_engine") or hasattr(x, "engine_core")
    return inside and hasattr(x, "collective_rpc") and hasattr(x, "generate")


def _call(client: Any, what: str, payload: bytes) -> Any:
    if what not in ASKED:
        raise RequestError(f"nothing is called {what!r}", next_step="use the same version of this "
                           "package in the trainer and in the actor")  # fmt: skip
    args = msgspec.msgpack.decode(payload, type=ASKED[what])
    return getattr(client, "push" if what in ("patch", "broadcast") else what)(*args)


async def _answered(engine: AsyncEngine, what: str, payload: bytes) -> bytes:
    try:
        return _encoded(await _call(engine, what, payload))
    except Exception as exc:  # across the process border errors are data
        return _error(exc)


def _encoded(answer: Any) -> bytes:
    return msgspec.msgpack.encode({"ok": msgspec.to_builtins(answer)})


def _error(exc: Exception) -> bytes:
    return msgspec.msgpack.encode({"error": exchange.unexpected(exc).to_dict()})


async def _stays() -> bool:
    """Whether the trainer has gone away: Ray does not tell."""
    return False


class AsyncEngine:
    """An `AsyncLLM`, asked as a `trainer.client.Client` is; on the loop that it runs on."""

    def __init__(self, engine: Any) -> None:
        self._control = EngineControl(engine)

    async def push(self, request: msg.Push) -> Outcome:
        if isinstance(request, msg.BroadcastPush):
            return await self._control.push_broadcast(request, _stays)
        if isinstance(request, PatchPush):
            if request.form == "broadcast":
                return await self._control.push_broadcast(request, _stays)
            request.check()
        elif request.register is not None:
            request.register.check()
        return await self._control.push(request)

    async def checksums(self, specs: tuple[ParamSpec, ...]) -> Held:
        return held(await self._control.call(msg.Sums(specs=specs)), specs)

    async def join(self, info: dict[str, Any]) -> None:
        await self._control.run(broadcast.join(info))

    async def start(self, body: msg.StartBody) -> tuple[str, msg.PlanReport | None]:
        done = await self._control.run(exchange.start(body))
        return done.session, done.report

    async def bucket(self, session: str, index: int) -> dict[str, float]:
        return (await self._control.run(exchange.bucket(index, session))).seconds

    async def receive(self, session: str) -> dict[str, float]:
        return (await self._control.run(broadcast.receive(session))).seconds

    async def finish(self, body: msg.FinishBody) -> Outcome:
        return await self._control.finish(body)

    async def abort(self, session: str, reason: str) -> None:
        await self._control.run(exchange.abort(msg.AbortBody(reason[:4096], session)))

    async def status(self) -> dict[str, Any]:
        return await status_of(self._control)

    async def shutdown(self) -> None:
        agree(await self._control.call(msg.Shutdown()))
