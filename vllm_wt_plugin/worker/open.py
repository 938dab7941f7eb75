"""What a session remembers: the update under way, the one before it, the reply being made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.moved import Moved
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.export import Attached
from vllm_wt_plugin.worker.known import Registered
from vllm_wt_plugin.worker.packed import PackedUpdate
from vllm_wt_plugin.worker.parts import Part
from vllm_wt_plugin.worker.patches import Arriving, PatchUpdate
from vllm_wt_plugin.worker.plan.update import Place, Update


@dataclass
class Open:
    """What is known of the update under way."""

    session: str
    owner: str
    lease_s: float
    deadline: float  # monotonic
    since: float
    resume_after: bool
    wrote: bool = False
    prepared: Registered | None = None
    way: str = ""  # how its tensors come; one update, one way
    packed: PackedUpdate | None = None
    arriving: Arriving | None = None
    part: Part | None = None  # the last one that was broadcast
    attached: Attached | None = None  # who writes in place
    update: Update | None = None  # a complete one, ready for commit
    parts: dict[str, ParamSpec] = field(default_factory=dict)  # of an unannounced update
    written: set[str] = field(default_factory=set)
    filled: dict[Place, str] = field(default_factory=dict)  # by a part of it
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    patches: list[PatchUpdate] = field(default_factory=list)  # each call brings some
    ephemeral: list[str] = field(default_factory=list)  # registrations of this update alone

    def __str__(self) -> str:
        since = time.strftime("%H:%M:%S", time.gmtime(self.since))
        return f"an update of {self.owner or 'an unnamed trainer'} is open since {since} UTC"

    def by(self, way: str) -> None:
        """Raise RequestError unless all of its tensors come that way."""
        if self.way not in ("", way):
            raise RequestError(
                f"tensors came {self.way}, and now {way}",
                next_step="send all of an update in one way",
            )
        self.way = way

    def moved(self) -> Moved:
        """What it brought, once it is committed."""
        if self.patches:
            rows = [p.moved for p in self.patches]
            nbytes, changed = sum(m.bytes for m in rows), sum(m.changed for m in rows)
            return Moved("sparse", nbytes, changed, rows[0].elements)
        if self.attached is not None:
            return Moved("in place")
        if self.parts:
            return Moved("dense", sum(s.nbytes for s in self.parts.values()))
        came = self.update if self.packed is None else self.packed
        return Moved("dense", 0 if came is None else came.plan.report.bytes)

    def state(self, version: str, dirty: str, asleep: tuple[str, ...]) -> msg.State:
        left = max(0.0, self.deadline - time.monotonic())
        return msg.State(
            "UPDATING", version, dirty, self.owner, self.session, self.since, left,
            self.resume_after, self.wrote, asleep,
        )  # fmt: skip


@dataclass(frozen=True)
class Committed:
    """The last update, if it was patches: `before` is the version it started from."""

    session: str
    patches: list[PatchUpdate]
    before: str


@dataclass
class Draft:
    """What the verbs of one call add up to."""

    error: dict[str, str] | None = None
    report: msg.PlanReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    mine: bool = False  # the call acts on the open update: its error ends a half-done one

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
