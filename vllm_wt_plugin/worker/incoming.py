"""Updates that come in buckets: through a trainer's shared buffers, or broadcast to its group."""

from __future__ import annotations

import time
from collections.abc import Callable

from vllm_wt_plugin.errors import NoUpdate, RequestError
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.nccl import Progress, Receive, ReceiveNamed, Written, checked
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.known import Known
from vllm_wt_plugin.worker.link import WAIT_S, Link
from vllm_wt_plugin.worker.open import Draft, Open
from vllm_wt_plugin.worker.packed import PackedUpdate

Verb = msg.Announce | msg.Bucket | Receive | ReceiveNamed | Progress | Written


class Incoming:
    """Runs these verbs for a session, on its open update."""

    def __init__(self, known: Known, link: Link, synchronize: Callable[[], None]) -> None:
        self._known, self._link, self._synchronize = known, link, synchronize
        self._last_named: tuple[ParamSpec, ...] = ()  # by vLLM's trainers

    def run(self, verb: Verb, open_: Open, out: Draft) -> None:
        if isinstance(verb, msg.Announce):
            return self._announce(verb, open_, out)
        if isinstance(verb, ReceiveNamed):
            verb = self._named(verb, open_, out)
        packed = open_.packed
        if packed is None:
            raise NoUpdate("no packed update is announced", next_step="start one")
        match verb:
            case msg.Bucket():
                open_.by("in buckets")
                self._bucket(verb.index, packed, open_, out)
            case Receive():
                open_.by("by broadcast")
                self._link.receive(packed)
                out.info["receiving"] = True
            case Progress():
                self._progress(packed, open_, out)
            case Written():
                with out.timed("verify"):
                    out.info |= self._known.written(packed, verb.names)

    def _announce(self, verb: msg.Announce, open_: Open, out: Draft) -> None:
        """Know where every tensor goes before the first bucket comes."""
        if verb.group is not None:
            self._link.expect(verb.group)
        announced, new = self._known.announced(verb, out.timed)
        if new:
            out.report = announced.plan.report
        names = checked(announced.specs, verb.verify, verb.round)
        open_.packed = PackedUpdate(announced, self._known.host, names)

    def _named(self, verb: ReceiveNamed, open_: Open, out: Draft) -> Receive:
        """What ours announce, from what vLLM's trainers say."""
        specs = verb.specs or self._last_named
        if not specs:
            raise RequestError("`names` is empty, and nothing was named before")
        if open_.packed is not None:
            raise RequestError(
                "an update that is broadcast comes in one call",
                next_step="name all tensors in one update_weights, or serve upstream_nccl",
            )
        self._link.expect(None)
        announced, new = self._known.announced(
            self._link.announcement(specs, verb.packed), out.timed
        )
        if new:
            out.report = announced.plan.report
        self._last_named = specs
        open_.packed = PackedUpdate(announced, self._known.host)
        return Receive(verb.session)

    def _bucket(self, index: int, packed: PackedUpdate, open_: Open, out: Draft) -> None:
        """Copy one bucket out of its buffer, which the trainer fills anew when this returns."""
        with out.timed("wait"):
            packed.expect(index)
        with out.timed("copy"):
            open_.wrote = True
            packed.receive()
            self._synchronize()

    def _progress(self, packed: PackedUpdate, open_: Open, out: Draft) -> None:
        """Copy what arrives within a moment, each bucket while the next one travels."""
        deadline = time.monotonic() + WAIT_S
        while not packed.complete and (left := deadline - time.monotonic()) > 0:
            with out.timed("wait"):
                index = self._link.next(left)
            if index is not None:
                open_.wrote = True
                packed.receive()
                self._link.release()
        if packed.complete:
            with out.timed("copy"):
                self._synchronize()
            self._link.done()
        out.info["receiving"] = not packed.complete
