"""Pushes over a group: one broadcast for all replicas, and what becomes of each.

    meet (once) → start on every replica → broadcast ∥ receive on every replica → finish on each

Replicas that know the tensors already are asked once for all three, before the trainer has looked
whether they are the same; the trainer's checksums then come behind the last bucket.

HTTP, which can fail, is waited for by the thread that pushes; the collective, which can hang, has
a thread of its own. Whatever fails ends the group on both sides, and the next push meets anew.
"""

from __future__ import annotations

import secrets
import threading
import time
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch
from msgspec.structs import replace

from vllm_wt_plugin.errors import NotBegun, UnknownRegistration, WeightSyncError
from vllm_wt_plugin.trainer.client import Client
from vllm_wt_plugin.trainer.listing import Listing
from vllm_wt_plugin.trainer.meeting import OWN, CouldNotMeet, GroupOptions, Meeting, meet
from vllm_wt_plugin.trainer.patching import PatchSender
from vllm_wt_plugin.trainer.replicas import GRACE_S, ask, culprits, gather, shared
from vllm_wt_plugin.trainer.sending import Outgoing, Sums, Update, gathering, send_bytes, walk
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.messages import (
    Announcement,
    BroadcastPush,
    FinishBody,
    PlanReport,
    StartBody,
)
from vllm_wt_plugin.wire.nccl import FORMS, checked

SOON_S = 0.05  # for which a push waits until its requests have left
_Done = tuple[dict[str, Outcome], dict[str, WeightSyncError]]  # by replica


@dataclass
class Sent:
    """What became of a broadcast, by replica."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    errors: dict[str, WeightSyncError] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    walked: bool = False  # the source, to its end
    _last: float = field(default_factory=time.perf_counter)

    def lap(self, phase: str) -> None:
        """What has passed since the last lap was this phase."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


@dataclass
class _Asked:
    """Replicas that were asked for an update, by name: their sessions, and what they answer."""

    update: Update
    sessions: dict[str, str] = field(default_factory=dict)
    sent: dict[str, threading.Event] = field(default_factory=dict)
    futures: dict[str, Future[Any]] = field(default_factory=dict)

    def fits(self, source: Listing, version: str, clients: list[Client]) -> bool:
        u = self.update
        return u.source is source and u.version == version and u.clients == clients

    def on_its_way(self) -> None:
        """Wait until every request is, or for a moment: what comes next leaves Python no pause to
        send one in."""
        deadline = time.monotonic() + SOON_S
        for sent in self.sent.values():
            sent.wait(max(0.0, deadline - time.monotonic()))


class Broadcaster:
    """The trainer's end. One push at a time, from one thread; `close()` ends the group."""

    def __init__(
        self, options: GroupOptions, owner: str, pool: Executor, plans: dict[str, PlanReport]
    ) -> None:
        self.options, self._owner, self._pool, self._plans = options, owner, pool, plans
        self._meeting: Meeting | None = None
        self._announcement: Announcement | None = None
        self._outgoing = Outgoing((), options)
        self._known: dict[str, str] = {}  # replica → the announcement it holds
        self._round = 0
        self._aborts: list[Future[None]] = []
        self._settled_by = 0.0
        self._asked: _Asked | None = None
        self._foresees = True

    def begin(self, source: Listing | None, version: str, clients: list[Client]) -> None:
        """Ask every replica for a push of `source` as it was last time, before the trainer has
        looked at it: that takes about as long as a request to arrive. `push`, or `call_off`, comes
        next. Does nothing where they would have to be asked more than once."""
        meeting, a = self._meeting, self._announcement
        if source is None or a is None or source.specs != a.specs:
            return
        if not (self._foresees and meeting is not None and meeting.of(clients)):
            return
        update = self._next(meeting, source, version, list(clients), self._round + 1)
        if self._is_known(update) and all(c.aside for c in clients):
            self._asked = _Asked(update)
            self._ask(self._asked)
            self._asked.on_its_way()

    def call_off(self, reason: str) -> None:
        """What `begin` asked for does not come. Idempotent."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        asked.update.meeting.group.abort(reason)
        self._abort(asked.update.clients, asked.sessions, reason)
        wait(asked.futures.values(), GRACE_S)
        self.close()

    def push(self, source: Listing, version: str, clients: list[Client]) -> Sent:
        """To every client, in one broadcast. Raises RequestError for a source that cannot be sent;
        what a replica or the group fails with is in the result."""
        sent, left = Sent(), list(clients)
        if self._asked is not None and not self._asked.fits(source, version, left):
            self._foresees = False  # where tensors move once, they move again
            self.call_off("the trainer's tensors are others than last time")
        try:
            self._announce(source)
            self._round += 1
            while left:
                self._try(sent, source, version, left)
                lost = culprits(sent.errors)
                left = [c for c in left if c.name in sent.errors and c.name not in lost]
                stop = self.options.on_replica_error == "raise" or not lost
                if stop or (sent.walked and gathering(source)):
                    break  # a second walk would wait for ranks that do not walk again
                for c in left:
                    del sent.errors[c.name]
        finally:
            if not sent.walked:
                walk(source)
        return sent

    def _announce(self, source: Listing) -> None:
        """Anew where the tensors are others than last time."""
        specs, o = source.specs, self.options
        if self._announcement is not None and self._announcement.specs == specs:
            return
        self._outgoing = Outgoing(specs, o)
        self._announcement = Announcement(
            secrets.token_hex(16), specs, o.buffer_bytes, geometry=self._outgoing.geometry
        )

    def _try(self, sent: Sent, source: Listing, version: str, clients: list[Client]) -> None:
        names = [c.name for c in clients]
        for attempt in (1, 2):
            try:
                meeting = self._meet(source.device, clients)
            except CouldNotMeet as exc:
                sent.errors |= shared(names, exc.errors, exc.own)
                return
            self._outgoing.make_room(meeting.device)
            sent.lap("meet")
            update = self._next(meeting, source, version, clients, self._round)
            way = self._in_one if self._is_known(update) else self._in_three
            done, errors = way(update, sent)
            again = attempt == 1 and _restarted(errors) and not done
            if not again or (sent.walked and gathering(source)):
                break
            self.close()  # a replica was started anew, or served another trainer
        sent.outcomes |= done
        sent.errors |= errors
        if not errors:
            meeting.pushes += 1

    def _meet(self, device: torch.device, clients: list[Client]) -> Meeting:
        m = self._meeting
        if m is None or not m.of(clients):
            self.close()
            self._meeting = m = meet(self._pool, clients, self.options, device)
        return m

    def _next(
        self, meeting: Meeting, source: Listing, version: str, clients: list[Client], round_: int
    ) -> Update:
        a, verify = self._announcement, self.options.verify
        if a is None:
            raise RuntimeError("_announce() comes first")
        verify = verify or ("sample" if meeting.pushes else "full")
        body = StartBody(
            owner=self._owner, announced=a.id, group=meeting.id, verify=verify, round=round_
        )
        names = checked(a.specs, verify, round_)
        forms = {n: self._forms(n, clients) for n in names}
        return Update(meeting, source, version, clients, body, forms)

    def _is_known(self, update: Update) -> bool:
        """Whether every replica can take it in one request. Not if the source is walked: a
        replica may yet refuse, and a walk cannot be had again."""
        known = all(self._known.get(c.name) == update.body.announced for c in update.clients)
        return known and update.source.tensors is not None and len(update.forms) <= FORMS

    def _in_one(self, update: Update, sent: Sent) -> _Done:
        """Every replica begins, receives and commits in one request; no bucket is sent before all
        of them have begun."""
        own = self._outgoing.send(update, together=True)
        asked, self._asked = self._asked, None
        if asked is None:
            asked = self._ask(_Asked(update))
        found = self._answers(update.meeting, own, asked.futures, asked.sessions, update.clients)
        sent.lap("broadcast")
        return found

    def _ask(self, asked: _Asked) -> _Asked:
        """Send the requests; does not wait."""
        u = asked.update
        for c in u.clients:
            body = replace(u.body, session=secrets.token_hex(16))
            asked.sessions[c.name] = body.session
            sent = asked.sent[c.name] = threading.Event()
            request = BroadcastPush(body, u.version, u.forms)
            future = asked.futures[c.name] = self._pool.submit(c.push, request, sent.set)
            future.add_done_callback(lambda _, sent=sent: sent.set())  # type: ignore[misc]
        return asked

    def _in_three(self, update: Update, sent: Sent) -> _Done:
        """Each step once all replicas have done the one before."""
        clients, version = update.clients, update.version
        sessions, errors = self._start(update.body, clients)
        sent.lap("start")
        if errors:
            self._abort(clients, sessions, f"another replica refused: {min(errors)}")
            self._settle()
            return {}, shared([c.name for c in clients], errors, None)
        update.names = {n: self._forms(n, clients) for n in update.names}  # now they are known
        sent.walked = True
        sums, errors = self._transfer(update, sessions)
        sent.lap("broadcast")
        good = [c for c in clients if c.name not in errors]
        done, late = ask(self._pool, good, lambda c: self._finish(c, version, sessions, sums))
        sent.lap("finish")
        return done, errors | late

    def _start(
        self, body: StartBody, clients: list[Client]
    ) -> tuple[dict[str, str], dict[str, WeightSyncError]]:
        """Open the update on every replica: all has been checked when they agree."""

        def start(c: Client) -> str:
            known = self._known.get(c.name) == body.announced
            announce = None if known else self._announcement
            session, report = c.start(replace(body, announce=announce))
            self._known[c.name] = body.announced or ""
            if report is not None:
                self._plans[c.name] = report
            return session

        return ask(self._pool, clients, start)

    def _transfer(
        self, update: Update, sessions: dict[str, str]
    ) -> tuple[Sums, dict[str, WeightSyncError]]:
        """Broadcast, while every replica receives. Checksums of what was sent; errors."""
        meeting, clients = update.meeting, update.clients

        def failed() -> None:
            meeting.group.abort("a replica failed")
            self._abort(clients, sessions, "the transfer failed")

        own = self._outgoing.send(update)
        futures: dict[str, Future[Any]] = {
            c.name: self._pool.submit(c.receive, sessions[c.name]) for c in clients
        }
        done, errors = gather({OWN: own} | futures, failed)
        if gathering(update.source):
            wait([own], self.options.timeout_s)  # ranks that gather with this one are not done yet
        mine = errors.pop(OWN, None)
        if mine is None and not errors:
            return done[OWN], {}
        self.close()
        failed_names = [c.name for c in clients if mine is not None or c.name in errors]
        return done.get(OWN, {}), shared(failed_names, errors, mine)

    def _answers(
        self,
        meeting: Meeting,
        own: Future[Any],
        futures: dict[str, Future[Any]],
        sessions: dict[str, str],
        clients: list[Client],
    ) -> _Done:
        """What each replica makes of its request while `own` sends. Where one fails, so do the
        others, unless they have all that was sent."""

        def failed() -> bool:
            if own.done() and own.exception() is None:
                return False
            meeting.group.abort("a replica failed")
            self._abort(clients, sessions, "the transfer failed")
            return True

        done, errors = gather({OWN: own} | futures, failed)
        mine, _ = errors.pop(OWN, None), done.pop(OWN, None)
        if mine is None and not errors:
            return done, {}
        self.close()
        lost = [c.name for c in clients if c.name not in done]
        sent = own.done() and own.exception() is None
        return done, errors if sent else shared(lost, errors, mine)

    def patch(self, patches: PatchSender, clients: list[Client]) -> _Done:
        """Loaded patches to every client, in one broadcast and one request to each, which takes
        them, checks them and commits: outcomes and errors, by name."""
        push, data = patches.push, patches.data
        if push is None or data is None:
            raise RuntimeError("load() comes first")
        for attempt in (1, 2):
            try:
                meeting = self._meet(data.device, clients)
            except CouldNotMeet as exc:
                return {}, shared([c.name for c in clients], exc.errors, exc.own)
            request = replace(
                push, form="broadcast", registration=meeting.id, session=secrets.token_hex(16),
                bucket_bytes=self.options.buffer_bytes,
            )  # fmt: skip
            own = send_bytes(meeting, data, request.bucket_bytes, self.options.timeout_s)
            futures = {c.name: self._pool.submit(c.push, request) for c in clients}
            sessions = dict.fromkeys(futures, request.session)
            done, errors = self._answers(meeting, own, futures, sessions, clients)
            if attempt == 2 or done or not _restarted(errors):
                break
        return done, errors

    def _stored(self, c: Client, name: str) -> str:
        return self._plans[c.name].stored.get(name, "") if c.name in self._plans else ""

    def _forms(self, name: str, clients: list[Client]) -> set[str]:
        return {self._stored(c, name) for c in clients}

    def _finish(self, c: Client, version: str, sessions: dict[str, str], sums: Sums) -> Outcome:
        own = {n: by[self._stored(c, n)] for n, by in sums.items()}
        return c.finish(FinishBody(version, sessions[c.name], own))

    def _abort(self, clients: list[Client], sessions: dict[str, str], reason: str) -> None:
        """Without waiting: `_settle` does."""
        self._settled_by = time.monotonic() + GRACE_S
        self._aborts = [
            self._pool.submit(c.abort, sessions[c.name], reason)
            for c in clients
            if c.name in sessions
        ]

    def _settle(self) -> None:
        """Until every replica has ended what it was told to, but for those that hang."""
        wait(self._aborts, max(0.0, self._settled_by - time.monotonic()))
        self._aborts = []

    def close(self) -> None:
        """End the group; the next push makes another. Idempotent."""
        self.call_off("the trainer ends its group")
        self._settle()
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            meeting.group.close()
        self._known.clear()


def _restarted(errors: dict[str, WeightSyncError]) -> bool:
    """Or served another trainer; or was called off, by nobody's fault, as the group was lost."""
    kinds = {type(e) for e in errors.values()}
    return UnknownRegistration in kinds or (NotBegun in kinds and not culprits(errors))
