"""Pushes over a group: one broadcast for all replicas, and what becomes of each.

    meet (once) → start on every replica → broadcast ∥ receive on every replica → finish on each

HTTP, which can fail, is waited for by the thread that pushes; the collective, which can hang, has
a thread of its own. Whatever fails ends the group on both sides, and the next push meets anew.
"""

from __future__ import annotations

import secrets
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch

from vllm_wt_plugin.errors import UnknownRegistration, WeightSyncError
from vllm_wt_plugin.sparse.checksum import checksum_runs
from vllm_wt_plugin.trainer.client import Client
from vllm_wt_plugin.trainer.filling import Filling, Walk
from vllm_wt_plugin.trainer.listing import Listing
from vllm_wt_plugin.trainer.meeting import OWN, CouldNotMeet, GroupOptions, Meeting, meet
from vllm_wt_plugin.trainer.patching import PatchSender
from vllm_wt_plugin.trainer.replicas import ask, culprits, gather, shared
from vllm_wt_plugin.trainer.source import device_of, gathers
from vllm_wt_plugin.transport import group, nccl
from vllm_wt_plugin.wire.buckets import Bucket, Geometry, buckets_of, size
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.messages import Announcement, FinishBody, PlanReport, StartBody
from vllm_wt_plugin.wire.nccl import checked
from vllm_wt_plugin.wire.patches import PatchPush

Sums = dict[str, dict[str, int]]  # of a name, by the dtype that it was summed in


@dataclass
class Sent:
    """What became of a broadcast, by replica."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    errors: dict[str, WeightSyncError] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    walked: bool = False  # the source, to its end


class Broadcaster:
    """The trainer's end. One push at a time, from one thread; `close()` ends the group."""

    def __init__(
        self, options: GroupOptions, owner: str, pool: Executor, plans: dict[str, PlanReport]
    ) -> None:
        self.options, self._owner, self._pool, self._plans = options, owner, pool, plans
        self._meeting: Meeting | None = None
        self._announcement: Announcement | None = None
        self._buckets: list[Bucket] = []
        self._memory: list[torch.Tensor] = []
        self._filling: Filling | None = None
        self._known: dict[str, str] = {}  # replica → the announcement it holds
        self._round = 0

    def push(self, source: Listing, version: str, clients: list[Client]) -> Sent:
        """To every client, in one broadcast. Raises RequestError for a source that cannot be sent;
        what a replica or the group fails with is in the result."""
        sent, left = Sent(), list(clients)
        try:
            self._announce(source)
            self._round += 1
            while left:
                self._try(sent, source, version, left)
                lost = culprits(sent.errors)
                left = [c for c in left if c.name in sent.errors and c.name not in lost]
                stop = self.options.on_replica_error == "raise" or not lost
                if stop or (sent.walked and _gathers(source)):
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
        how: Geometry = "rows" if o.packed else "apart"
        self._buckets = buckets_of(specs, how, o.buffer_bytes)
        self._announcement = Announcement(
            secrets.token_hex(16), specs, o.buffer_bytes, geometry=how
        )
        self._memory, self._filling = [], None

    def _try(self, sent: Sent, source: Listing, version: str, clients: list[Client]) -> None:
        names = [c.name for c in clients]
        laps = _Laps(sent.seconds)
        for attempt in (1, 2):
            try:
                meeting = self._meet(device_of(source.source), clients)
            except CouldNotMeet as exc:
                sent.errors |= shared(names, exc.errors, exc.own)
                return
            self._make_room(meeting.device)
            laps("meet")
            sessions, errors = self._start(meeting, clients)
            laps("start")
            if not errors:
                break
            self._abort(clients, sessions, f"another replica refused: {min(errors)}")
            if attempt == 2 or not _restarted(errors):
                sent.errors |= shared(names, errors, None)
                return
            self.close()  # a replica was started anew, or served another trainer
        sums, errors = self._transfer(sent, meeting, source, clients, sessions)
        laps("broadcast")
        sent.errors |= errors
        good = [c for c in clients if c.name not in errors]
        done, errors = ask(self._pool, good, lambda c: self._finish(c, version, sessions, sums))
        laps("finish")
        sent.outcomes |= done
        sent.errors |= errors
        if not sent.errors:
            meeting.pushes += 1

    def _meet(self, device: torch.device, clients: list[Client]) -> Meeting:
        m, names = self._meeting, [c.name for c in clients]
        if m is None or list(m.ranks) != names or m.group.aborted:
            self.close()
            self._meeting = m = meet(self._pool, clients, self.options, device)
        return m

    def _make_room(self, device: torch.device) -> None:
        if not self._memory or self._memory[0].device != device:
            largest = max(map(size, self._buckets), default=1)
            self._memory, self._filling = nccl.buffers(largest, device), None

    def _start(
        self, meeting: Meeting, clients: list[Client]
    ) -> tuple[dict[str, str], dict[str, WeightSyncError]]:
        """Open the update on every replica: all has been checked when they agree."""
        a = self._announcement
        verify = self.options.verify or ("sample" if meeting.pushes else "full")
        self._names = [] if a is None else checked(a.specs, verify, self._round)

        def start(c: Client) -> str:
            known = a is not None and self._known.get(c.name) == a.id
            session, report = c.start(
                StartBody(
                    owner=self._owner, announced=None if a is None else a.id,
                    announce=None if known else a, group=meeting.id, verify=verify,
                    round=self._round,
                )
            )  # fmt: skip
            self._known[c.name] = "" if a is None else a.id
            if report is not None:
                self._plans[c.name] = report
            return session

        return ask(self._pool, clients, start)

    def _transfer(
        self,
        sent: Sent,
        meeting: Meeting,
        source: Listing,
        clients: list[Client],
        sessions: dict[str, str],
    ) -> tuple[Sums, dict[str, WeightSyncError]]:
        """Broadcast, while every replica receives. Checksums of what was sent; errors."""
        summing = _Summing({n: {self._stored(c, n) for c in clients} for n in self._names})
        after = nccl.current_stream(meeting.device)
        device, n = meeting.device, len(self._buckets)

        def send() -> Sums:
            fill: Filling | Walk = Walk(source, self._buckets, self._memory, summing.see)
            with nccl.on_side_stream(device, "fill", after), torch.no_grad():
                try:
                    if source.tensors is not None:
                        fill = self._planned(source)
                    sender = nccl.Sender(
                        meeting.group, self._memory, n, self.options.timeout_s, ahead=fill.ahead
                    )
                    for i, bucket in enumerate(self._buckets):
                        sender.buffer()
                        fill.fill(i)
                        sender.send(size(bucket))
                    fill.finish()
                    with nccl.on_side_stream(device, "sum", after):  # while the last ones travel
                        sums = summing.result(source)
                    sender.drain()
                    return sums
                except BaseException as exc:
                    meeting.group.abort(str(exc))
                    if _gathers(source):
                        fill.exhaust()
                    raise

        def failed() -> None:
            meeting.group.abort("a replica failed")
            self._abort(clients, sessions, "the transfer failed")

        own: Future[Sums] = group.run(
            send, "broadcast", lambda: meeting.group.abort("the process ends")
        )
        futures: dict[str, Future[Any]] = {
            c.name: self._pool.submit(c.receive, sessions[c.name]) for c in clients
        }
        sent.walked = True
        done, errors = gather({OWN: own} | futures, failed)
        if _gathers(source):
            wait([own], self.options.timeout_s)  # ranks that gather with this one are not done yet
        mine = errors.pop(OWN, None)
        if mine is None and not errors:
            return done[OWN], {}
        self.close()
        failed_names = [c.name for c in clients if mine is not None or c.name in errors]
        return done.get(OWN, {}), shared(failed_names, errors, mine)

    def patch(
        self, patches: PatchSender, clients: list[Client]
    ) -> tuple[dict[str, Outcome], dict[str, WeightSyncError]]:
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
            session = secrets.token_hex(16)
            request = msgspec.structs.replace(
                push, form="broadcast", registration=meeting.id, session=session,
                bucket_bytes=self.options.buffer_bytes,
            )  # fmt: skip
            done, errors = self._send_patches(meeting, data, request, clients)
            if not errors:
                break
            self.close()
            if attempt == 2 or done or not _restarted(errors):
                break
        return done, errors

    def _send_patches(
        self, meeting: Meeting, data: torch.Tensor, request: PatchPush, clients: list[Client]
    ) -> tuple[dict[str, Outcome], dict[str, WeightSyncError]]:
        after = nccl.current_stream(meeting.device)
        parts = data.to(meeting.device).split(request.bucket_bytes)

        def send() -> None:
            sender = nccl.Sender(
                meeting.group, parts, len(parts), self.options.timeout_s, ahead=True
            )
            try:
                with nccl.on_side_stream(meeting.device, "fill", after):
                    for part in parts:
                        sender.buffer()
                        sender.send(len(part))
                    sender.drain()
            except BaseException as exc:
                meeting.group.abort(str(exc))
                raise

        def failed() -> None:
            meeting.group.abort("a replica failed")
            self._abort(clients, {c.name: request.session for c in clients}, "the transfer failed")

        futures: dict[str, Future[Any]] = {
            OWN: group.run(send, "broadcast", lambda: meeting.group.abort("the process ends"))
        }
        futures |= {c.name: self._pool.submit(c.push, request) for c in clients}
        done, errors = gather(futures, failed)
        mine, _ = errors.pop(OWN, None), done.pop(OWN, None)
        lost = [c.name for c in clients if c.name not in done]
        return done, shared(lost, errors, mine)

    def _planned(self, source: Listing) -> Filling:
        """The same as last time for the same tensors in the same buffers."""
        if self._filling is None or self._filling.source is not source:
            self._filling = Filling(source, self._buckets, self._memory)
        return self._filling

    def _stored(self, c: Client, name: str) -> str:
        return self._plans[c.name].stored.get(name, "") if c.name in self._plans else ""

    def _finish(self, c: Client, version: str, sessions: dict[str, str], sums: Sums) -> Outcome:
        own = {n: by[self._stored(c, n)] for n, by in sums.items()}
        return c.finish(FinishBody(version, sessions[c.name], own))

    def _abort(self, clients: list[Client], sessions: dict[str, str], reason: str) -> None:
        """Without waiting: a replica that hangs does not answer."""
        for c in clients:
            if c.name in sessions:
                self._pool.submit(c.abort, sessions[c.name], reason)

    def close(self) -> None:
        """End the group; the next push makes another. Idempotent."""
        meeting, self._meeting = self._meeting, None
        if meeting is not None:
            meeting.group.close()
        self._known.clear()


def walk(source: Listing) -> None:
    """Iterate a source that gathers, so that it lines up with the rank that sends."""
    if _gathers(source):
        for _ in source:
            pass


def _gathers(source: Listing) -> bool:
    return source.tensors is None and gathers(source.source)


class _Summing:
    """Checksums of what is sent: of a walk's tensors while they are there, else all at once."""

    def __init__(self, dtypes: dict[str, set[str]]) -> None:
        self._dtypes = dtypes
        self._sums: Sums = defaultdict(dict)

    def see(self, name: str, t: torch.Tensor) -> None:
        self._add([(name, t)])

    def _add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        rows = [(n, d, t) for n, t in tensors for d in self._dtypes.get(n, ())]
        cast = [(n, t.to(getattr(torch, d)) if d else t, 0) for n, d, t in rows]
        for (n, d, _), s in zip(rows, checksum_runs(cast), strict=True):
            self._sums[n][d] = s

    def result(self, source: Listing) -> Sums:
        """After a walk, or of tensors that last."""
        self._add(source.tensors or ())
        return dict(self._sums)


class _Laps:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now


def _restarted(errors: dict[str, WeightSyncError]) -> bool:
    return any(isinstance(e, UnknownRegistration) for e in errors.values())
