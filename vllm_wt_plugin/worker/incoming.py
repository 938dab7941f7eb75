"""Updates that come in buckets: through a trainer's shared buffers, or broadcast to its group."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from vllm_wt_plugin.errors import NoUpdate, RequestError
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.nccl import (
    Progress,
    Receive,
    ReceiveNamed,
    ReceivePatches,
    Written,
    checked,
)
from vllm_wt_plugin.wire.params import ParamSpec, check_specs
from vllm_wt_plugin.worker.known import Known
from vllm_wt_plugin.worker.link import WAIT_S, Link
from vllm_wt_plugin.worker.open import Draft, Open
from vllm_wt_plugin.worker.packed import PackedUpdate
from vllm_wt_plugin.worker.parts import Part
from vllm_wt_plugin.worker.patches import Arriving, patchable

Verb = msg.Announce | msg.Bucket | Receive | ReceiveNamed | ReceivePatches | Progress | Written


class Incoming:
    """Runs these verbs for a session, on its open update."""

    def __init__(
        self,
        known: Known,
        link: Link,
        synchronize: Callable[[], None],
        holds: Callable[[], tuple[str, str]],  # version of the live weights, and why DIRTY
    ) -> None:
        self._known, self._link, self._synchronize = known, link, synchronize
        self._holds = holds
        self._last_named: tuple[ParamSpec, ...] = ()  # by vLLM's trainers

    def run(self, verb: Verb, open_: Open, out: Draft) -> None:
        if isinstance(verb, msg.Announce):
            return self._announce(verb, open_, out)
        if isinstance(verb, ReceivePatches):
            return self._patches(verb, open_, out)
        if isinstance(verb, ReceiveNamed):
            return self._named(verb, open_, out)
        packed, coming = open_.packed, open_.arriving or open_.part or open_.packed
        if isinstance(verb, Progress) and coming is not None:
            return self._progress(coming, open_, out)
        if packed is None:
            raise NoUpdate("no packed update is announced", next_step="start one")
        match verb:
            case msg.Bucket():
                open_.by("in buckets")
                self._bucket(verb.index, packed, open_, out)
            case Receive():
                packed.expect_sums(verb.forms, partial(self._known.sum_written, packed))
                self._receive(packed, open_, out, together=verb.together)
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

    def _receive(
        self, coming: PackedUpdate | Part, open_: Open, out: Draft, *, together: bool = False
    ) -> None:
        open_.by("by broadcast")
        self._link.receive(coming.memory, coming.sizes, together=together)
        out.info["receiving"] = True

    def _named(self, verb: ReceiveNamed, open_: Open, out: Draft) -> None:
        """What ours announce, from what vLLM's trainers say: everything, or a part of it."""
        specs = verb.specs or self._last_named
        if not specs:
            raise RequestError("`names` is empty, and nothing was named before")
        if open_.packed is not None:
            raise RequestError(
                "every tensor of the model has come already", next_step="finish the update"
            )
        self._link.expect(None)
        announce = self._link.announcement(specs, verb.packed, verb.buffer_bytes)
        if open_.parts or not self._known.complete(specs):
            with out.timed("plan"):
                check_specs(specs)
                plan = self._known.part(specs)
            out.report = plan.report
            open_.part = Part.of(plan, announce, self._known.host.device)
            return self._receive(open_.part, open_, out)
        announced, new = self._known.announced(announce, out.timed)
        if new:
            out.report = announced.plan.report
        self._last_named = specs
        open_.packed = PackedUpdate(announced, self._known.host)
        return self._receive(open_.packed, open_, out)

    def _patches(self, verb: ReceivePatches, open_: Open, out: Draft) -> None:
        """Begin to receive, if these weights can take them; without values nothing will come."""
        open_.by("as patches")
        self._link.expect(verb.push.registration if verb.push.form == "broadcast" else None)
        patched, _ = patchable(self._known, verb.push, *self._holds(), out.timed)
        open_.arriving = Arriving(verb, patched, self._known.host.device)
        if not open_.arriving.complete:
            self._link.receive(open_.arriving.memory, open_.arriving.sizes)
        out.info["receiving"] = not open_.arriving.complete

    def _bucket(self, index: int, packed: PackedUpdate, open_: Open, out: Draft) -> None:
        """Copy one bucket out of its buffer, which the trainer fills anew when this returns."""
        with out.timed("wait"):
            packed.expect(index)
        with out.timed("copy"):
            open_.wrote = True
            packed.receive()
            self._synchronize()

    def _progress(self, coming: PackedUpdate | Part | Arriving, open_: Open, out: Draft) -> None:
        """Take what arrives within a moment, each bucket while the next one travels."""
        deadline = time.monotonic() + WAIT_S
        while not coming.complete and (left := deadline - time.monotonic()) > 0:
            with out.timed("wait"):
                index = self._link.next(left, ahead=coming.ahead)
            if index is not None:
                open_.wrote |= coming.writes
                coming.receive()
                self._link.release()
                if isinstance(coming, PackedUpdate):
                    coming.sum()
        here = False
        if coming.complete:
            with out.timed("wait"):
                here = self._link.complete(max(0.0, deadline - time.monotonic()))
        if here:
            with out.timed("copy"):
                if isinstance(coming, Part):
                    coming.take(self._known, open_)
                self._synchronize()
            self._link.done()
        out.info["receiving"] = not here
