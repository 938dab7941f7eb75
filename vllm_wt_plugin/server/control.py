"""Drives updates on the engine of one API server: performs the actions of `wire/exchange.py`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import msgspec

from vllm_wt_plugin.errors import (
    EngineDirty,
    UnsupportedVLLM,
    WeightSyncError,
    from_dict,
)
from vllm_wt_plugin.server.metrics import metrics
from vllm_wt_plugin.wire import broadcast, exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.wire.patches import PatchPush
from vllm_wt_plugin.wire.replies import worst

logger = logging.getLogger("vllm.wt.server")
WATCH_S = 0.2  # into an update, before its lease is first looked at


class EngineControl:
    """One per API server process. The truth is in the workers; this only triggers and reports."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine  # vLLM's EngineClient (AsyncLLM)
        self.metrics = metrics()
        self.dirty = ""  # why requests are refused; as of the last reply
        self._quick = ""  # session of the update that was last opened in one call
        self._tasks: set[asyncio.Task[Any]] = set()
        self._turn = asyncio.Lock()  # one resumes while the other has not dropped its caches

    async def run(self, steps: exchange.Steps) -> exchange.Outcome:
        """Perform `steps` to their end even if the HTTP client goes away meanwhile."""
        return await self._recorded(self._in_turn(steps))

    async def _recorded(self, call: Coroutine[Any, Any, exchange.Outcome]) -> exchange.Outcome:
        return await asyncio.shield(self._spawn(self._record(call)))

    async def _record(self, call: Coroutine[Any, Any, exchange.Outcome]) -> exchange.Outcome:
        start = time.perf_counter()
        try:
            outcome = await call
        except Exception as exc:  # every failure counts, by its kind, and goes on to the caller
            error = exchange.unexpected(exc)
            self.metrics.failed(type(error).__name__, rolled_back=error.rolled_back)
            raise
        self.metrics.committed(outcome, time.perf_counter() - start)
        return outcome

    async def abort(self, body: msg.AbortBody) -> None:
        """End the named update, or whatever is open."""
        if (await self.run(exchange.abort(body))).session:
            self.metrics.aborts.labels("request").inc()

    async def _in_turn(self, steps: exchange.Steps) -> exchange.Outcome:
        async with self._turn:
            return await self._drive(steps)

    async def push(self, request: msg.PushRequest | PatchPush) -> exchange.Outcome:
        """A whole update: in one call of the engine core if that is idle, else step by step."""
        name = exchange.core_method(request)
        return await self._at_once(name, request, exchange.push(request))

    async def start(self, body: msg.StartBody) -> exchange.Outcome:
        """Open an update; one in place, or that is broadcast, in one call of an idle core."""
        if body.attached is None and body.group is None:
            return await self.run(exchange.start(body))
        return await self._at_once("weight_start", body, exchange.start(body))

    async def finish(self, body: msg.FinishBody) -> exchange.Outcome:
        """Commit the open update; one that began so in one call of an idle core."""
        if not body.session or body.session != self._quick:
            return await self.run(exchange.finish(body))
        return await self._at_once("weight_finish", body, exchange.finish(body))

    @property
    def backend(self) -> str:
        """The name that this engine was started with."""
        name: str = self.engine.vllm_config.weight_transfer_config.backend
        return name

    async def receive(
        self, steps: exchange.Steps, session: str, gone: Callable[[], Awaitable[bool]]
    ) -> exchange.Outcome:
        """Take a broadcast; ended when the trainer who waits for it is `gone`."""
        return await self._until_gone(self._in_turn(steps), session, gone)

    async def push_broadcast(
        self, push: broadcast.Broadcast, gone: Callable[[], Awaitable[bool]]
    ) -> exchange.Outcome:
        """A whole update that is broadcast: its two ends in one call of an idle core each."""
        push = broadcast.checked(push)
        return await self._until_gone(self._push_broadcast(push), push.session, gone)

    async def _push_broadcast(self, push: broadcast.Broadcast) -> exchange.Outcome:
        opening, go_on = broadcast.core_methods(push)
        steps = [await self._at_once_in_turn(opening, push, broadcast.opening(push))]
        while steps[-1].session:  # others, who may abort it, have their turn between two looks
            steps.append(await self._at_once_in_turn(go_on, push, broadcast.go_on(push)))
        return broadcast.in_all(*steps)

    async def _until_gone(
        self,
        call: Coroutine[Any, Any, exchange.Outcome],
        session: str,
        gone: Callable[[], Awaitable[bool]],
        period_s: float = 0.5,
    ) -> exchange.Outcome:
        task = self._spawn(self._record(call))
        while not (await asyncio.wait({task}, timeout=period_s))[0]:
            if await gone():
                reason = "the trainer has gone away"
                await self.run(exchange.abort(msg.AbortBody(reason, session)))
        return await asyncio.shield(task)

    async def _at_once(self, name: str, request: object, steps: exchange.Steps) -> exchange.Outcome:
        return await self._recorded(self._at_once_in_turn(name, request, steps))

    async def _at_once_in_turn(
        self, name: str, request: object, steps: exchange.Steps
    ) -> exchange.Outcome:
        async with self._turn:
            core = self.engine.engine_core
            if len(core.core_engines) > 1:  # engines must agree before any of them commits
                return await self._drive(steps)
            payload = msgspec.msgpack.encode(request)
            rows = await core.call_utility_all_async(name, payload)
            reply = msgspec.convert(rows[0], exchange.PushReply)
            if reply.busy:
                return await self._drive(steps)
            if reply.outcome is None:
                self._note(await self.call(msg.Status()))
                error = from_dict(reply.error or {})
                error.rolled_back = reply.rolled_back
                raise error
            if not reply.outcome.session:
                self.dirty = ""
            elif reply.outcome.session != self._quick:
                self._quick = reply.outcome.session
                self._spawn(self._watch_session(self._quick))
            return reply.outcome

    async def _drive(self, steps: exchange.Steps) -> exchange.Outcome:
        seconds: dict[str, float] = {}
        try:
            action = next(steps)
            while True:
                start = time.perf_counter()
                try:
                    result = await self._perform(action)
                # Whatever an action raises, the steps decide what to undo.
                except Exception as exc:
                    action = steps.throw(exc)
                else:
                    exchange.note_time(seconds, action, start)
                    action = steps.send(result)
        except StopIteration as stop:
            outcome: exchange.Outcome = stop.value
            return replace(outcome, seconds=seconds | outcome.seconds)

    async def _perform(self, action: exchange.Action) -> Any:
        core = self.engine.engine_core
        match action:
            case exchange.Call():
                return await self.call(*action.verbs)
            case exchange.IsPaused():
                return any(await core.call_utility_all_async("is_scheduler_paused"))
            case exchange.Pause():
                # Not AsyncLLM.pause_generation, which sleeps 20 ms.
                return await core.pause_scheduler_async(mode="keep", clear_cache=False)
            case exchange.ResetCaches():
                return await self._reset_caches()
            case exchange.SetVersion():
                return await core.call_utility_all_async("set_weight_version", action.version)
            case exchange.Resume():
                return await core.resume_scheduler_async()
            case exchange.Rest():
                self._turn.release()
                await self._turn.acquire()  # after whoever waits
            case exchange.WatchLease():
                self._spawn(self._watch(action))

    async def call(self, *verbs: msg.Verb) -> list[msg.Reply]:
        """Run verbs on every worker of every data-parallel engine; one Reply each, never raises
        for what a worker says."""
        payload = msg.encode_verbs(*verbs)
        # collective_rpc alone would bring the first engine's answers only. No timeout: vLLM would
        # leave late replies in the queue for the next call.
        per_engine = await self.engine.engine_core.call_utility_all_async(
            "collective_rpc", "weight_sync", None, (payload,), None
        )
        replies = [msgspec.convert(r, msg.Reply) for rows in per_engine for r in rows]
        self._note(replies)
        return replies

    async def check(self) -> None:
        """Raise unless every worker has the verb (the plugin runs in the workers too)."""
        try:
            agree(await self.call(msg.Status()))
        except WeightSyncError:
            raise
        # vLLM says that a worker lacks a method with whatever its executor raises.
        except Exception as exc:
            raise UnsupportedVLLM(
                f"the workers have no weight sync verb: {exc}",
                next_step="name `wt` in VLLM_PLUGINS for every process of the engine",
            ) from exc

    def _note(self, replies: list[msg.Reply]) -> None:
        # An update that heals a DIRTY engine carries the old reason until it commits.
        dirty = next((r.state.reason for r in replies if r.state.reason), "")
        if dirty and dirty != self.dirty:
            logger.error("the weights are DIRTY: %s", dirty)
        elif self.dirty and not dirty:
            logger.info("the weights are whole again")
        self.dirty = dirty
        self.metrics.saw(worst(replies))

    async def _reset_caches(self) -> None:
        core = self.engine.engine_core
        exchange.must_reset(*await core.call_utility_all_async("reset_prefix_cache", True, True))
        if self.engine.model_config.is_multimodal_model:
            await self.engine.reset_mm_cache()
            await self.engine.reset_encoder_cache()

    # ---- leases -----------------------------------------------------------------------

    async def _watch_session(self, session: str) -> None:
        await asyncio.sleep(WATCH_S)  # not in the way of an update that is short
        states = [r.state for r in await self.call(msg.Status())]
        mine = next((s for s in states if s.session == session), None)
        if mine is not None:
            await self._watch(exchange.WatchLease(session, mine.owner, mine.resume_after))

    async def _watch(self, begun: exchange.WatchLease) -> None:
        """Have the open update end when its trainer has gone silent."""
        replies = await self.call(msg.Status())
        while any(r.state.session == begun.session for r in replies):
            await asyncio.sleep(min(1.0, max(0.05, replies[0].state.lease_left_s)))
            replies = await self.call(msg.Status())
        # Whoever aborts an update resumes the engine; when its lease ends, that is nobody.
        if not any(r.info["ended"] == [begun.session, "lease"] for r in replies):
            return
        self.metrics.aborts.labels("lease").inc()
        logger.warning("the lease of an update of %s ended", begun.owner or "an unnamed trainer")
        async with self._turn:
            states = [r.state for r in await self.call(msg.Status())]
            if begun.resume_after and all(s.phase == "IDLE" and not s.asleep for s in states):
                await self.engine.engine_core.resume_scheduler_async()

    async def poll(self, period_s: float = 1.0) -> None:
        """With several API processes: learn what the others did."""
        while True:
            await self.call(msg.Status())
            await asyncio.sleep(period_s)

    def start_polling(self) -> None:
        self._spawn(self.poll())

    def _spawn(self, coro: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coro)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def refuse_if_dirty(self) -> None:
        if self.dirty:
            raise EngineDirty(
                f"the weights are DIRTY: {self.dirty}",
                next_step="push a complete dense update (POST /push_weights)",
            )
