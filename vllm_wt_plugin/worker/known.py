"""What a worker keeps from one update to the next: plans, registrations, announcements."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_wt_plugin.errors import (
    HandleError,
    NoUpdate,
    PlanError,
    TransferError,
    UnknownRegistration,
    UnsupportedVLLM,
)
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.wire.params import ParamSpec, check_specs
from vllm_wt_plugin.wire.patches import PatchPush, Widths, widths
from vllm_wt_plugin.worker.packed import Announced, PackedUpdate, Summing
from vllm_wt_plugin.worker.places import Places, describe_patching
from vllm_wt_plugin.worker.plan.build import FLOATS, build
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.update import Replay

if TYPE_CHECKING:
    from vllm_wt_plugin.worker.open import Open

BUFFERS = 2  # of patches: a trainer uses one, and one more while it grows
KEEP = 4  # of each, the last used; a trainer uses one
Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True)
class Registered:
    """A trainer's tensors as this worker sees them; `replay` unless it is a part of an update."""

    registration: Registration
    plan: LoadPlan
    tensors: dict[str, torch.Tensor]
    replay: Replay | None


@dataclass(frozen=True)
class Patched:
    """What a push of patches names, checked once for all pushes that name the same."""

    named: tuple[object, ...]
    specs: tuple[ParamSpec, ...]
    numels: list[int]
    widths: Widths
    places: Places


class Known:
    """Finds what a trainer names by an id, or makes it from what the trainer sends along."""

    def __init__(
        self,
        host: Callable[[], Host],
        importer: Importer,
        *,
        rank: int = 0,
        keeps_shadow: bool = False,
        partial: bool = False,
    ) -> None:
        self.importer, self._rank = importer, rank
        self._make_host = host
        self._host: Host | None = None
        self._registered: OrderedDict[str, Registered] = OrderedDict()
        self._announced: OrderedDict[str, Announced] = OrderedDict()
        self._plans: OrderedDict[tuple[tuple[ParamSpec, ...], bool], LoadPlan] = OrderedDict()
        self.keeps_shadow, self.partial = keeps_shadow, partial
        self.shadow: dict[str, torch.Tensor] = {}
        self._last_places: Places | None = None
        self._patched: Patched | None = None
        self._buffers: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    @property
    def host(self) -> Host:
        """Made when it is first needed: an engine that nobody updates is left alone."""
        if self._host is None:
            self._host = self._make_host()
        return self._host

    @property
    def registrations(self) -> list[str]:
        return list(self._registered)

    def memory(self) -> dict[str, int]:
        """Bytes: this process's CUDA memory, and how much of its trainers' is mapped here."""
        held = {"mapped": sum(self.importer.mapped().values())}
        if torch.cuda.is_initialized():
            device = self.importer.device
            held["allocated"] = torch.cuda.memory_allocated(device)
            held["reserved"] = torch.cuda.memory_reserved(device)
        return held

    def plan(self, specs: tuple[ParamSpec, ...], *, complete: bool) -> LoadPlan:
        key = specs, complete
        if key not in self._plans:
            self._plans[key] = build(self.host, specs, complete=complete)
            describe_patching(self._plans[key], self.keeps_shadow)
            self._patched = None
            if len(self._plans) > KEEP:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]

    def part(self, specs: tuple[ParamSpec, ...]) -> LoadPlan:
        """The plan of a part of an update: cut from one of the whole model, as soon as there is
        one; a new one takes about as long as that of everything."""
        whole = self._whole(specs)
        if whole is None and self.partial and not self._plans:
            self._plan_own()
            whole = self._whole(specs)
        if whole is None:
            return self.plan(specs, complete=False)
        return whole.only({s.name for s in specs})

    def _plan_own(self) -> None:
        """Of the engine's own checkpoint, that names what an update may leave as it is."""
        try:
            own = self.host.checkpoint()
        except UnsupportedVLLM:  # dummy weights, or another loader: the first update brings all
            return
        self.plan(own, complete=True)

    def together(self, plan: LoadPlan) -> set[str]:
        """Names of a part that are not written without others, where some weights may stay as they
        are: until the update ends those may yet come."""
        whole = self._whole(tuple(plan.specs.values())) if self.partial else None
        return set() if whole is None else self._places_of(whole).grouped & plan.specs.keys()

    def parts(self, open_: Open, *, mixed: bool) -> LoadPlan:
        """The plan of an update whose parts have all come. Raises PlanError unless these are all
        of the model; or some of it, where that is allowed and the weights are not `mixed`.
        TransferError where a part was written that is computed with others."""
        specs = tuple(open_.parts.values())
        whole = self._whole(specs) if self.partial and not mixed else None
        plan = self.plan(specs, complete=True) if whole is None else self._some(specs, whole)
        if early := open_.written & plan.computed_names:
            raise TransferError(
                "these names cannot be sent apart from the others: "
                + ", ".join(sorted(early)[:20]),
                where=min(early),
                next_step="send all names of a layer in one call",
            )
        return plan

    def _some(self, specs: tuple[ParamSpec, ...], whole: LoadPlan) -> LoadPlan:
        names = {s.name for s in specs}
        if missing := self._places_of(whole).group_of(names) - names:
            raise PlanError(
                "the served model makes one tensor of these and others, which did not come: "
                + ", ".join(sorted(missing)[:20]),
                where=min(names),
                next_step="send all of them in one update",
            )
        return whole.only(names)

    def _whole(self, specs: tuple[ParamSpec, ...]) -> LoadPlan | None:
        """A plan of the whole model that has these tensors, as they are; or, where an update may
        bring some of them, as other floats."""
        for key, plan in self._plans.items():
            if key[1] and all(self._has(plan, s) for s in specs):
                self._plans.move_to_end(key)
                return plan
        return None

    def _has(self, plan: LoadPlan, spec: ParamSpec) -> bool:
        have = plan.specs.get(spec.name)
        if have is None or have == spec:
            return have is not None
        same = self.partial and have.shape == spec.shape
        return same and {have.dtype, spec.dtype} <= FLOATS

    def complete(self, specs: tuple[ParamSpec, ...]) -> bool:
        """Whether these tensors are all that the model needs."""
        whole = self._whole(specs)
        if whole is not None and 2 * sum(s.numel for s in specs) < whole.report.elements:
            return False  # of two names for one tensor it can lack one, and not more
        try:
            self.plan(specs, complete=True)
        except PlanError:
            return False  # what else is wrong with them, their own plan says
        return True

    def patched(self, push: PatchPush) -> tuple[Patched, bool]:
        """What `push` names, and whether that took a new plan. Raises what is wrong with it."""
        last = self._patched
        if last is not None and last.named == push.named:
            push.check_counts(last.numels)
            return last, False
        specs = push.check()
        places, new = self._patchable((*specs, *push.whole))
        places.check(specs)
        numels = [s.numel for s in specs]
        self._patched = Patched(push.named, specs, numels, widths(specs), places)
        return self._patched, new

    def places(self, specs: tuple[ParamSpec, ...]) -> tuple[Places, bool]:
        """Where patches of these tensors go: by the newest plan that has them all, else by a new
        one (True).

        A plan made for a dense push is used again, whatever dtype its trainer had."""
        plan = self._with(specs)
        if plan is not None:
            return self._places_of(plan), False
        return self._places_of(self.plan(specs, complete=False)), True

    def _with(self, specs: tuple[ParamSpec, ...]) -> LoadPlan | None:
        for plan in reversed(self._plans.values()):
            if all((s := plan.specs.get(w.name)) and s.shape == w.shape for w in specs):
                return plan
        return None

    def _patchable(self, specs: tuple[ParamSpec, ...]) -> tuple[Places, bool]:
        """As `places`; but names that a plan of the whole model lacks have no place at all."""
        every = (p for (_, complete), p in reversed(self._plans.items()) if complete)
        plan = self._with(specs) or next(every, None)
        return self.places(specs) if plan is None else (self._places_of(plan), False)

    def places_for(self, specs: tuple[ParamSpec, ...] = ()) -> Places:
        """To read: of these tensors, or of the plan that was used last. Raises NoUpdate where
        there is none, RequestError, PlanError."""
        if specs:
            check_specs(specs)
            return self.places(specs)[0]
        if not self._plans:
            raise NoUpdate(
                "nobody has pushed yet: there is no plan",
                next_step="push dense first, or say which tensors: `specs`",
            )
        return self._places_of(next(reversed(self._plans.values())))

    def _places_of(self, plan: LoadPlan) -> Places:
        if self._last_places is None or self._last_places.plan is not plan:
            self._last_places = Places(plan, self.shadow)
        return self._last_places

    def keep_shadow(self, plan: LoadPlan, tensors: Mapping[str, torch.Tensor]) -> None:
        """After a dense push: the host's copy of what is computed from, if it is configured."""
        if self.keeps_shadow:
            self.shadow.clear()
            self.shadow |= {n: tensors[n].to("cpu", copy=True).contiguous()
                            for n in plan.report.whole if n in tensors}  # fmt: skip
            self._last_places = self._patched = None  # they know where the old copy lies

    def registered(self, verb: msg.Prepare, timed: Timed) -> tuple[Registered, bool]:
        """What `verb` names, and whether it is new. Raises UnknownRegistration, HandleError."""
        key = verb.registration
        new = key not in self._registered
        if new:
            if verb.register is None or verb.register.id != key:
                raise UnknownRegistration(
                    "the worker does not hold these handles",
                    next_step="send the registration again",
                )
            self._registered[key] = self._open(verb.register, verb.complete, timed)
            for old in {verb.replaces or "", *self.registrations[:-KEEP]} - {key}:
                self.release(old)
        elif verb.register not in (None, self._registered[key].registration):
            raise HandleError(
                "this registration id is in use for other tensors",
                next_step="register again: every registration has an id of its own",
            )
        self._registered.move_to_end(key)
        return self._registered[key], new

    def _open(self, reg: Registration, complete: bool, timed: Timed) -> Registered:
        with timed("plan"):
            plan = self.plan(reg.specs, complete=True) if complete else self.part(reg.specs)
        with timed("open"):
            tensors = self.importer.open(reg)
            try:
                replay = Replay(plan, tensors) if complete else None
            except BaseException:
                self.importer.close(reg.id)
                raise
        return Registered(reg, plan, tensors, replay)

    def announced(self, verb: msg.Announce, timed: Timed) -> tuple[Announced, bool]:
        """What `verb` names, and whether it is new. Raises UnknownRegistration, PlanError."""
        key = verb.announced
        new = key not in self._announced
        if new:
            if verb.announce is None or verb.announce.id != key:
                raise UnknownRegistration(
                    "the worker does not know this announcement", next_step="send it again"
                )
            check_specs(verb.announce.specs)
            with timed("plan"):
                plan = self.plan(verb.announce.specs, complete=True)
            with timed("open"):
                self._announced[key] = Announced(
                    verb.announce, plan, self.importer, self.host.device, self._rank
                )
            for old in list(self._announced)[:-KEEP]:
                self._announced.pop(old).close()
        self._announced.move_to_end(key)
        return self._announced[key], new

    def sum_written(self, update: PackedUpdate, names: Collection[str]) -> Summing:
        """Begin to sum those of `names` that lie in live memory as they came."""
        places = self._places_of(update.plan)
        live = [n for n in names if n not in places.whole and n in places.served]
        return places.begin_sums(live)

    def written(self, update: PackedUpdate, names: Collection[str]) -> dict[str, Any]:
        """`sums`: of what lies in live memory, by part; `received`: of what came of tensors that
        the engine holds in another form. Without `names`: of those that the trainer summed."""
        received = {n: s for n, s in update.received.items() if n in (names or update.told)}
        begun = None if names else update.summing
        sums = begun or self.sum_written(update, names or update.told)
        return {"sums": sums(), "received": received, "told": update.told}

    def patch_memory(self, push: PatchPush) -> dict[str, torch.Tensor]:
        """What a push of patches came in. Raises UnknownRegistration, HandleError."""
        key = push.registration
        if key not in self._buffers:
            if push.register is None or push.register.id != key:
                raise UnknownRegistration(
                    "the worker does not hold this buffer", next_step="send its registration again"
                )
            self._buffers[key] = self.importer.open(push.register)
            for old in list(self._buffers)[:-BUFFERS]:
                del self._buffers[old]
                self.importer.close(old)
        self._buffers.move_to_end(key)
        self.importer.check_alive(key)
        self.importer.wait_by_id(key)
        return self._buffers[key]

    def close_patches(self, registration: str) -> None:
        """Of a push of patches. Idempotent."""
        if self._buffers.pop(registration, None) is not None:
            self.importer.close(registration)

    def release(self, registration: str) -> None:
        if self._registered.pop(registration, None) is not None:
            self.importer.close(registration)

    def forget(self) -> None:
        """Close every mapping; plans stay."""
        for key in self.registrations:
            self.release(key)
        while self._announced:
            self._announced.popitem()[1].close()
        self._buffers.clear()
        self.importer.close()
