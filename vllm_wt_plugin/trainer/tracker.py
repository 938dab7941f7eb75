"""Which replicas hold what, and so who can be sent changes alone.

push: Snapshot.changes → PatchSender → replicas at the snapshot's version; the others are left
settle: what a dense push to those others brought, and the snapshot of it all
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal

from vllm_wt_plugin.errors import (
    AccessDenied,
    EngineAsleep,
    ServerUnreachable,
    UpdateInProgress,
    WeightSyncError,
)
from vllm_wt_plugin.trainer.client import Client
from vllm_wt_plugin.trainer.delta import Begun, Changes, Cost, Snapshot
from vllm_wt_plugin.trainer.listing import Listing
from vllm_wt_plugin.trainer.patching import PatchSender
from vllm_wt_plugin.trainer.replicas import ask, overdue
from vllm_wt_plugin.trainer.report import ReplicaOutcome
from vllm_wt_plugin.transport.layout import BaseExporter
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.messages import PlanReport
from vllm_wt_plugin.wire.replies import Held

Mode = Literal["dense", "auto", "sparse"]
Where = Literal["device", "host"]
# Patches that are loaded, to these replicas: what each did, or failed with.
Broadcast = Callable[
    [PatchSender, list[Client]], tuple[dict[str, Outcome], dict[str, WeightSyncError]]
]
FINAL = (AccessDenied, EngineAsleep, ServerUnreachable, UpdateInProgress)  # dense fails as well


@dataclass(frozen=True)
class Sent:
    """What went sparse: to these replicas, and how many bytes to each."""

    outcomes: dict[str, ReplicaOutcome]
    tensors: int
    nbytes: int
    changed: float
    seconds: dict[str, float] = field(default_factory=dict)


class Tracker:
    """One per `WeightSync`; keeps nothing until the first push that is not dense.

    `plans`: the replicas' reports, as they come in. `pool` runs the requests of several replicas.
    `broadcast`: sends to all at once, so changes alone go out where every replica can take them.
    """

    def __init__(
        self,
        exporter: Callable[[], BaseExporter],
        plans: dict[str, PlanReport],
        owner: str,
        where: Where,
        pool: Executor,
        broadcast: Broadcast | None = None,
    ) -> None:
        self._exporter, self._plans, self._owner, self._where = exporter, plans, owner, where
        self._pool, self._broadcast = pool, broadcast
        self._snapshot: Snapshot | None = None
        self._version = ""  # of the snapshot
        self._plan: PlanReport | None = None
        self._at: set[str] = set()  # replicas that hold exactly the snapshot
        self._sender: PatchSender | None = None
        self._cost = Cost()
        self._changes: Changes | None = None
        self._foresees = True

    def adopt(self, source: Listing, held: Mapping[str, Held], unseen: Collection[str]) -> None:
        """`source` is what these replicas hold, but for `unseen`, which nobody could compare."""
        first = next(iter(held.values()))
        self._plan, self._version = first.report, first.version
        self._snapshot = Snapshot(source, first.report, host=self._where == "host")
        self._snapshot.doubt(unseen)
        self._at = self._alike({n for n, h in held.items() if h.version == first.version})

    def begin(self, source: Listing | None, clients: list[Client]) -> Begun | None:
        """What `push` will compare, if these are still the source's tensors."""
        if source is None or self._snapshot is None:
            return None
        if not (self._foresees and self._ready(clients)):
            return None
        return self._snapshot.begin(source)

    def _ready(self, clients: list[Client]) -> list[Client]:
        """Those that can be sent changes."""
        ready = [c for c in clients if c.name in self._at]
        return [] if self._broadcast is not None and len(ready) < len(clients) else ready

    def push(
        self, source: Listing, version: str, mode: Mode, clients: list[Client],
        begun: Begun | None = None,
    ) -> Sent | None:  # fmt: skip
        """Send what changed to every replica that holds the last push. Those that are not in the
        outcome's table want a dense push: they were never tried, or refused in a way it heals."""
        self._changes = None
        self._foresees &= begun is None or begun.source is source  # what moves once moves again
        ready = self._ready(clients)
        start = time.perf_counter()
        if self._snapshot is None or not ready or not self._snapshot.fits(source):
            return None
        most = self._cost.most(self._snapshot.total) if mode == "auto" else 1.0
        changes = self._snapshot.changes(source, most, begun)
        if changes is None:
            return None
        compared = time.perf_counter()
        if self._sender is None:
            self._sender = PatchSender(None if self._broadcast is not None else self._exporter())
        self._sender.load(changes, self._snapshot.first(), self._version, version, self._owner)
        loaded = time.perf_counter()
        if self._broadcast is None:
            done, errors = ask(self._pool, ready, self._sender.send)
        else:
            done, errors = self._broadcast(self._sender, ready)
        for name in errors:
            self._at.discard(name)
            self._sender.forget(name)
        outcomes = {n: self._took(n, o) for n, o in done.items()}
        outcomes |= {
            n: ReplicaOutcome(name=n, error=e) for n, e in errors.items() if isinstance(e, FINAL)
        }
        if any(overdue(e) for e in errors.values()):
            self._sender.close()  # its buffer may be read later than we wait
            self._sender = None
        self._changes = changes
        now = time.perf_counter()
        seconds = {"diff": compared - start, "pack": loaded - compared, "request": now - loaded}
        share = changes.changed / max(changes.total, 1)
        return Sent(outcomes, len(source.specs), changes.bytes, share, seconds)

    def _took(self, name: str, done: Outcome) -> ReplicaOutcome:
        return ReplicaOutcome(
            name=name, version=done.version, seconds=done.seconds, plan=self._plans.get(name)
        )

    def settle(
        self,
        source: Listing,
        version: str,
        outcomes: Iterable[ReplicaOutcome],
        seconds: float,
        dense: bool,
    ) -> None:
        """After a push in mode auto or sparse: who holds what now, and what it took."""
        good = [o.name for o in outcomes if o.error is None]
        changes, self._changes = self._changes, None
        if not good:
            return  # everybody holds what they held
        if dense:
            self._cost.note_dense(seconds)
        elif changes is not None:
            self._cost.note_sparse(seconds, changes.changed, changes.total)
        plan = self._plans.get(good[0])
        if plan is None:
            return
        if self._snapshot is None or not self._snapshot.fits(source) or plan is not self._plan:
            self._snapshot = Snapshot(source, plan, host=self._where == "host")
            self._plan = plan
        elif changes is not None:
            self._snapshot.accept(changes)
        else:
            self._snapshot.retake(source)
        self._version = version
        self._at = self._alike(good)

    def _alike(self, names: Iterable[str]) -> set[str]:
        """Those that take the same patches as the replica whose plan the snapshot goes by."""
        plan = self._plan
        return {
            n for n in names
            if plan is not None and (p := self._plans.get(n)) is not None
            and (p.stored, p.whole, p.shadowed) == (plan.stored, plan.whole, plan.shadowed)
        }  # fmt: skip

    def missed(self) -> None:
        """A dense push went past: nobody is known to hold the snapshot any more."""
        self._at.clear()

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._snapshot = self._changes = None
