"""`WeightSync`: the trainer's one object. source → exporter → every replica, one request each."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Self

import torch

from vllm_wt_plugin.errors import (
    HandleError,
    RequestError,
    UnknownRegistration,
    VersionMismatch,
    WeightSyncError,
)
from vllm_wt_plugin.trainer.broadcast import Broadcaster
from vllm_wt_plugin.trainer.client import Client, LLMClient, client_for, tell_apart
from vllm_wt_plugin.trainer.listing import Lister, Listing
from vllm_wt_plugin.trainer.meeting import GroupOptions
from vllm_wt_plugin.trainer.packed import PackedSender, PackedSenders
from vllm_wt_plugin.trainer.replicas import GRACE_S, answers, culprits, overdue
from vllm_wt_plugin.trainer.report import PushReport, ReplicaOutcome, VerifyReport
from vllm_wt_plugin.trainer.sending import walk
from vllm_wt_plugin.trainer.source import gathers
from vllm_wt_plugin.trainer.tracker import Mode, Tracker, Where
from vllm_wt_plugin.trainer.verify import verify
from vllm_wt_plugin.transport.ipc import Exporter
from vllm_wt_plugin.transport.memory import MemoryExporter
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.wire.messages import PlanReport, PushRequest
from vllm_wt_plugin.wire.nccl import RENDEZVOUS_S, Verify
from vllm_wt_plugin.wire.replies import Held

AT_ONCE = 1024  # requests: a broadcast waits for all replicas, and an abort must not

# What a dense push says: tensors and bytes, what became of each replica, seconds by phase.
_Dense = tuple[int, int, list[ReplicaOutcome], dict[str, float]]


@dataclass(frozen=True)
class _Export:
    registration: Registration
    nbytes: int
    listing: Listing
    tensors: list[tuple[str, torch.Tensor]]  # kept, so that no address can come again


class WeightSync:
    """Pushes weights into running vLLM engines: on this host (`backend="ipc"`), or anywhere that
    a broadcast reaches (`"nccl"`; gloo on CPU), to all of them at once.

    `target`: a server's URL, a list of URLs, or a `vllm.LLM`. `token` defaults to `WT_TOKEN`.
    `packed` sends through two buffers of `buffer_bytes` instead of the tensors' own memory: for
    sources that gather (default: only those) or whose memory CUDA cannot share.
    `nccl` always does, with buffers of 384 MiB, unless `packed=False`: each tensor by itself.
    `verify`, `on_replica_error`, `host`, `port`, `rendezvous_s`, `sender`: of `nccl` alone, see
    `GroupOptions`; `timeout_s` bounds one transfer there, else each wait for an answer.
    `snapshot`: where the copy for sparse pushes is kept, "device" (the tensors' own) or "host".
    Call `push` from one thread; the tensors must not change until it returns. `close()` (or
    leaving a `with`) releases shared memory and the replicas' mappings of it.
    """

    def __init__(
        self,
        target: str | Sequence[str] | Any,
        *,
        token: str | None = None,
        timeout_s: float = 300.0,
        owner: str | None = None,
        packed: bool | None = None,
        buffer_bytes: int | None = None,
        snapshot: Where = "device",
        backend: Literal["ipc", "nccl"] = "ipc",
        verify: Verify | None = None,
        on_replica_error: Literal["raise", "drop"] = "raise",
        host: str = "127.0.0.1",
        port: int = 0,
        rendezvous_s: float = RENDEZVOUS_S,
        sender: bool | None = None,
    ) -> None:
        targets = list(target) if isinstance(target, (list, tuple)) else [target]
        if not targets:
            raise RequestError("no target", next_step="give at least one server")
        self._token = os.environ.get("WT_TOKEN") if token is None else token
        self._timeout_s = timeout_s
        if backend == "nccl":  # replicas keep the deadlines, and say more when they pass
            self._timeout_s = max(timeout_s, rendezvous_s) + 2 * GRACE_S
        self._clients = [self._client(t) for t in targets]
        tell_apart(self._clients)
        in_process = all(_in_process(c) for c in self._clients)
        self._exporter = MemoryExporter() if in_process else Exporter()
        self._owner = owner or f"{socket.gethostname()}:{os.getpid()}"
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="weight-sync")
        self._packed = packed
        self._senders = PackedSenders(buffer_bytes or 1 << 30, timeout_s)
        self._known: dict[str, str] = {}  # replica → the registration it holds
        self._plans: dict[str, PlanReport] = {}
        self._lister = Lister()
        self._last: _Export | None = None
        self._broadcaster: Broadcaster | None = None
        if backend == "nccl":
            options = GroupOptions(
                host=host, port=port, timeout_s=timeout_s, rendezvous_s=rendezvous_s,
                buffer_bytes=buffer_bytes or GroupOptions.buffer_bytes, packed=packed is not False,
                verify=verify, on_replica_error=on_replica_error, sender=sender,
            )  # fmt: skip
            self._broadcaster = Broadcaster(options, self._owner, self._pool, self._plans)
        self._tracker = Tracker(
            MemoryExporter if in_process else Exporter, self._plans, self._owner, snapshot,
            self._pool, None if self._broadcaster is None else self._broadcaster.patch,
        )  # fmt: skip
        self._pushes = 0
        self._closed = False

    def _client(self, target: Any) -> Client:
        return client_for(target, token=self._token, timeout_s=self._timeout_s)

    def add(self, target: str) -> None:
        """From now on push to this server too; its first push is dense, whatever the mode.

        A server of the list that is restarted, or starts late, needs no `add`: it is noticed.
        """
        client = self._client(target)
        if any(c.name == client.name for c in self._clients):
            raise RequestError("this replica is in the list", where=client.name)
        self._clients.append(client)

    def remove(self, target: str) -> None:
        """Push to this server no more; it keeps the weights it has."""
        client = next((c for c in self._clients if c.name == target.rstrip("/")), None)
        if client is None or len(self._clients) == 1:
            raise RequestError("not in the list, or the last of it", where=target)
        self._clients.remove(client)
        self._known.pop(client.name, None)
        self._plans.pop(client.name, None)
        client.close()

    def push(
        self, source: Any, version: str | int | None = None, *, mode: Mode = "dense"
    ) -> PushReport:
        """Make `source` the served weights of every replica, as `version` (default: a counter).

        `source`: `nn.Module`, mapping, iterable of (name, tensor), checkpoint folder, or a
        `Source`. `mode`: "dense" sends everything. "auto" keeps a copy of what was pushed last
        (`snapshot` says where) and sends what differs from it wherever that is cheaper by the
        times measured so far; "sparse" does so whatever it costs. A replica that does not hold
        the last push gets everything in any mode; the served bits are the same in all.
        Blocking. Raises what the first failing replica says, with the report of all
        as `exc.report`; a replica that refuses keeps serving its old weights.
        """
        if self._closed:
            raise RequestError("this WeightSync is closed", next_step="make a new one")
        self._pushes += 1
        version = str(self._pushes if version is None else version)
        start = time.perf_counter()
        via, begun = self._broadcaster, None
        try:
            if mode != "dense":
                begun = self._tracker.begin(self._lister.recall(source), self._clients)
            elif via is not None:
                via.begin(self._lister.recall(source), version, self._clients)
            listing = self._lister.list(source)
        except BaseException:
            if via is not None:
                via.call_off("the trainer could not list its tensors")
            raise
        seconds = {"list": time.perf_counter() - start}
        if via is not None and not via.options.sends:
            walk(listing)
            return PushReport(version=version, tensors=len(listing.specs), bytes=0,
                              seconds={"total": 0.0}, replicas=())  # fmt: skip
        if via is not None and listing.tensors is None and gathers(listing.source):
            mode = "dense"  # another rank walks the source once, whatever is sent
        sent = None
        if mode != "dense":
            sent = self._tracker.push(listing, version, mode, self._clients, begun)
        begun = None  # and the memory that it has
        left = [c for c in self._clients if sent is None or c.name not in sent.outcomes]
        outcomes = {} if sent is None else dict(sent.outcomes)
        seconds |= {} if sent is None else sent.seconds
        tensors, nbytes = (0, 0) if sent is None else (sent.tensors, sent.nbytes)
        if left:
            tensors, nbytes, dense, phases = self._push_dense(listing, version, left)
            outcomes |= {o.name: o for o in dense}
            seconds |= phases
        done = [outcomes[c.name] for c in self._clients]
        if mode == "dense":
            self._tracker.missed()
        else:
            self._tracker.settle(listing, version, done, time.perf_counter() - start, bool(left))
        seconds["total"] = time.perf_counter() - start
        report = PushReport(
            version=version,
            tensors=tensors,
            bytes=nbytes,
            seconds=seconds,
            replicas=tuple(done),
            changed=None if sent is None else sent.changed,
        )
        lost = [o.name for o in done if o.error is not None]
        drops = via is not None and via.options.on_replica_error == "drop"
        if not drops or len(lost) == len(done):
            return _checked(report)
        for name in lost:
            self.remove(name)
        return report

    def verify(self, source: Any = None) -> VerifyReport:
        """Read every weight of every replica and compare checksums with `source`'s (default: the
        one pushed last). Blocking; names what differs, and what cannot be compared."""
        given = self._lister.given if source is None else source
        if given is None:
            raise RequestError("nothing was pushed yet", next_step="push, or give a source")
        listing = self._lister.list(given)
        return verify(self._held(listing), listing)

    def adopt(self, source: Any) -> VerifyReport:
        """Go on from weights that the replicas hold already: a trainer that was restarted, a
        checkpoint they were started from. The next push in mode "sparse" or "auto" then sends
        what differs from `source`. Blocking: compares checksums, as `verify`; tensors that no
        checksum reaches are sent in full once. Raises VersionMismatch naming what differs.
        """
        listing = self._lister.list(source)
        held = self._held(listing)
        found = verify(held, listing)
        for replica, names in found.differ.items():
            if names:
                raise VersionMismatch(
                    f"version {held[replica].version!r} is not this source: {len(names)} tensors "
                    f"differ: {', '.join(names[:20])}",
                    where=replica,
                    next_step="push dense",
                )
        self._plans |= {name: h.report for name, h in held.items()}
        self._tracker.adopt(listing, held, {n for names in found.unseen.values() for n in names})
        return found

    def _held(self, source: Listing) -> dict[str, Held]:
        return answers(self._pool, self._clients, lambda c: c.checksums(source.specs))

    def _push_dense(self, source: Listing, version: str, clients: list[Client]) -> _Dense:
        """By broadcast; or the tensors' own memory, read by the workers, or through buffers."""
        if self._broadcaster is not None:
            return self._push_broadcast(self._broadcaster, source, version, clients)
        start = time.perf_counter()
        made = source.tensors is None and gathers(source.source)
        if self._packed or (self._packed is None and made):
            return self._push_packed(source, version, clients)
        export = self._export(source)
        registration = export.registration
        exported = time.perf_counter()
        self._exporter.refresh()
        staged = time.perf_counter()

        done = answers(self._pool, clients, lambda c: self._push_one(c, registration, version))
        outcomes = list(done.values())
        if len(clients) == len(self._clients) and all(o.error is None for o in outcomes):
            self._exporter.retire()  # nobody reads an earlier registration any more
        if any(isinstance(o.error, HandleError) or overdue(o.error) for o in outcomes):
            # It is gone, or a server may read it later than we wait: the next push shares it anew.
            self._last = None
            self._exporter.forget()
        now = time.perf_counter()
        seconds = {
            "export": exported - start,
            "stage": staged - exported,
            "request": now - staged,
        }
        return len(registration.tensors), export.nbytes, outcomes, seconds

    def _push_broadcast(
        self, via: Broadcaster, source: Listing, version: str, clients: list[Client]
    ) -> _Dense:
        sent = via.push(source, version, clients)
        outcomes = [
            self._outcome(c, sent.outcomes[c.name])
            if c.name in sent.outcomes
            else ReplicaOutcome(name=c.name, error=sent.errors[c.name])
            for c in clients
        ]
        return len(source.specs), sum(s.nbytes for s in source.specs), outcomes, sent.seconds

    def _push_packed(self, source: Listing, version: str, clients: list[Client]) -> _Dense:
        """To one replica after another: a source that gathers is iterated once for each."""
        specs, sender = source.specs, self._senders.get(source.source, source.specs, len(clients))
        outcomes = [self._packed_one(c, sender, source, version) for c in clients]
        if any(isinstance(o.error, HandleError) for o in outcomes):
            self._senders.close()  # the shared memory is gone: the next push makes it anew
        return len(specs), sum(s.nbytes for s in specs), outcomes, {}

    def _packed_one(
        self, c: Client, sender: PackedSender, source: Listing, version: str
    ) -> ReplicaOutcome:
        if _in_process(c):
            raise RequestError(
                "an LLM whose worker is in this process takes no packed pushes",
                next_step="leave out packed=True; gather a sharded model into a dict first",
            )
        try:
            known = self._known.get(c.name) == sender.announcement.id
            done = sender.push(c, source.source, version, self._owner, known)
        except WeightSyncError as exc:
            self._known.pop(c.name, None)
            return ReplicaOutcome(name=c.name, error=exc)
        if sender.ranks.leads:
            self._known[c.name] = sender.announcement.id
        return self._outcome(c, done)

    def status(self) -> list[dict[str, Any]]:
        """Each replica's state: phase, version, dirty reason, open update."""
        return list(answers(self._pool, self._clients, lambda c: c.status()).values())

    def close(self) -> None:
        """Idempotent. Replicas that are gone are left alone."""
        if self._closed:
            return
        self._closed = True
        if self._broadcaster is not None:
            self._broadcaster.close()
        for c in self._clients:
            try:
                if c.name in self._known:
                    c.shutdown()
            except WeightSyncError:
                pass  # it dies or is busy with another trainer: its mappings end with the memory
            finally:
                c.close()
        self._pool.shutdown(wait=self._broadcaster is None)  # one that hangs keeps a thread
        self._last = None
        self._lister.close()
        self._senders.close()
        self._exporter.close()
        self._tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _export(self, source: Listing) -> _Export:
        """Handles of the source's tensors; those of last time if nothing has moved since."""
        if self._last is None or self._last.listing is not source:
            tensors = list(source)
            registration, _ = self._exporter.register(tensors)
            nbytes = sum(s.nbytes for s in registration.specs)
            self._last = _Export(registration, nbytes, source, tensors)
        return self._last

    def _push_one(self, c: Client, reg: Registration, version: str) -> ReplicaOutcome:
        known = self._known.get(c.name)
        request = PushRequest(reg.id, reg, version, self._owner, replaces=known)
        if known == reg.id:
            request = PushRequest(reg.id, None, version, self._owner)
        try:
            try:
                done = c.push(request)
            except UnknownRegistration:  # the replica restarted, or served others meanwhile
                done = c.push(PushRequest(reg.id, reg, version, self._owner))
        except WeightSyncError as exc:
            if isinstance(exc, HandleError):
                self._known.pop(c.name, None)
            return ReplicaOutcome(name=c.name, error=exc)
        self._known[c.name] = reg.id
        return self._outcome(c, done)

    def _outcome(self, c: Client, done: Outcome) -> ReplicaOutcome:
        if done.report is not None:
            self._plans[c.name] = done.report
        outcome = ReplicaOutcome(name=c.name, version=done.version, seconds=done.seconds)
        return replace(outcome, plan=self._plans.get(c.name))


def _checked(report: PushReport) -> PushReport:
    """The report, or a replica's error with the report on it: of one that others failed with."""
    errors = {o.name: o.error for o in report.replicas if o.error is not None}
    if errors:
        error = errors[min(culprits(errors), default=next(iter(errors)))]
        error.report = report
        raise error
    return report


def _in_process(client: Client) -> bool:
    """An LLM whose workers live in this very process, where CUDA IPC cannot open."""
    return isinstance(client, LLMClient) and client.in_process
