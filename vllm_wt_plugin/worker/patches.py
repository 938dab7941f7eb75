"""A push of patches on one worker.

prepare (check, read old values, compare checksums) → apply (write) → commit; or undo: the old bits
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from vllm_wt_plugin.errors import (
    EngineDirty,
    HandleError,
    PlanError,
    TransferError,
    VersionMismatch,
)
from vllm_wt_plugin.sparse.checksum import ZERO, Sum
from vllm_wt_plugin.sparse.patch import WORDS, Group, check_known, ordered
from vllm_wt_plugin.sparse.scatter import scatter
from vllm_wt_plugin.wire.messages import PlanReport
from vllm_wt_plugin.wire.patches import Part, PatchPush, Section, layout
from vllm_wt_plugin.worker.known import Known, Timed
from vllm_wt_plugin.worker.places import Places, part_key
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.update import Update


def open_patches(
    known: Known, push: PatchPush, version: str, dirty: str, timed: Timed
) -> tuple[PatchUpdate, PlanReport | None]:
    """The update that `push` asks of weights at `version`, checked; the report of a new plan."""
    if dirty:
        raise EngineDirty(
            f"patches need whole weights to start from, these are DIRTY: {dirty}",
            next_step="push a complete dense update",
        )
    if push.base_version != version:
        raise VersionMismatch(
            f"the patches start from version {push.base_version!r}, the engine holds {version!r}",
            next_step="push dense",
        )
    push.check()
    with timed("wait"):
        buffer = known.buffer(push)
    with timed("plan"):
        places, new = known.places((*push.specs, *push.whole))
    with timed("read"):
        update = PatchUpdate(known.host, places, push, buffer)
    return update, places.plan.report if new else None


class PatchUpdate:
    """One push of patches under way. `undo` is exact, and possible after commit too, unless
    whole tensors without a shadow were written (`exact`)."""

    def __init__(self, host: Host, places: Places, push: PatchPush, buffer: torch.Tensor) -> None:
        self._host, self._places, self._push = host, places, push
        specs = push.specs
        if specs:
            check_known(specs, places.served)
        plan = layout(specs, push.num_updates_list, push.whole)
        if plan.nbytes > buffer.numel():
            raise HandleError(
                f"the patches need {plan.nbytes} bytes, their buffer has {buffer.numel()}",
                where="registration",
            )
        groups = [ordered(_group(push, s, buffer)) for s in plan.sections]
        self._scatters = [
            (g, scatter(g, [places.rows(s.name) for s in g.specs]))
            for whole in groups
            for g in _by_device(whole, places)
        ]
        self._sent = {
            spec.name: buffer[at : at + spec.nbytes]
            .view(getattr(torch, spec.dtype))
            .view(spec.shape)
            for spec, at in zip(push.whole, plan.whole_at, strict=True)
        }
        self._check_whole()
        self._patched = {s.name for s in specs} & places.whole.keys()
        self.exact = not self._sent
        self.wrote = False

    def _check_whole(self) -> None:
        """Tensors in full come with all of their group, as a dense update would bring them."""
        for spec in self._push.whole:
            if (have := self._places.plan.specs.get(spec.name)) is None or have != spec:
                raise PlanError(f"the engine's plan has {have}, not {spec}", where=spec.name)
        if missing := self._places.group_of(self._sent) - self._sent.keys():
            raise PlanError(
                "sent in full without the tensors that go with it: "
                + ", ".join(sorted(missing)[:20]),
                where=min(self._sent),
                next_step="send all names that the plan's report gives one group",
            )

    def prepare(self) -> dict[str, list[Part]]:
        """Read the old values and compare checksums; writes nothing live.

        Returns the parts of tensors that no rank holds whole, for all ranks to be added up.
        Raises TransferError where the engine's old values, or what arrived, are not the trainer's.
        """
        want = dict(zip(self._push.names, self._push.sums, strict=False))
        wrong, parts = [], dict[str, list[Part]]()
        for group, ways in self._scatters:
            for spec, have in zip(group.specs, ways.read(), strict=True):
                if spec.name not in want:
                    continue
                if self._places.holds_all(spec.name):
                    if Sum(*want[spec.name]) != have:
                        wrong.append(spec.name)
                elif rows := self._places.rows(spec.name):
                    parts[spec.name] = [(part_key(rows[0]), (have.a, have.b))]
                elif have != ZERO:
                    wrong.append(spec.name)
        check_sums(wrong)
        return parts

    @torch.no_grad()
    def apply(self) -> None:
        """Write. What is not a scatter goes through vLLM's processing, of its modules only."""
        self.wrote = True
        for _, ways in self._scatters:
            ways.write()
        self._process(self._sent)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old bits back."""
        if self.wrote:
            for _, ways in reversed(self._scatters):
                ways.undo()
            self._process({})
        self.wrote = False

    def _process(self, sent: dict[str, torch.Tensor]) -> None:
        shadowed = self._places.group_of(self._patched) - sent.keys()
        tensors = sent | {n: self._places.shadow[n] for n in shadowed}
        if not tensors and not self._places.plan.late:
            return  # every element is where it is computed with
        plan = self._places.plan.only(tensors)
        update = Update(self._host, plan)
        by_name = self._places.plan.by_name
        update.touched |= {m for n in self._push.names for m, _ in by_name.get(n, ())}
        device = self._host.device
        update.receive({n: t.to(device) for n, t in tensors.items()}, lasting=True)
        update.finish()


def check_sums(wrong: Iterable[str]) -> None:
    """Raise if any tensor's checksum is not the trainer's."""
    if names := sorted(wrong):
        raise TransferError(
            f"the checksum of {len(names)} tensors is not the trainer's: {', '.join(names[:20])}",
            where=names[0],
            next_step="nothing was written; push dense",
        )


def _group(push: PatchPush, s: Section, buffer: torch.Tensor) -> Group:
    specs = push.specs
    index = torch.int32 if s.index == 4 else torch.int64
    return Group(
        tuple(specs[i] for i in s.members),
        tuple(push.num_updates_list[i] for i in s.members),
        buffer[s.indices_at : s.indices_at + s.count * s.index].view(index),
        buffer[s.values_at : s.values_at + s.count * s.word].view(WORDS[s.word]),
    )


def _by_device(group: Group, places: Places) -> Iterable[Group]:
    """The group where its rows are: tensors with a shadow on the host go apart."""
    if group.values.device.type == "cpu" or not any(s.name in places.whole for s in group.specs):
        return [group]
    live, host = group.split(lambda s: s.name in places.whole)
    moved = Group(host.specs, host.counts, host.indices.cpu(), host.values.cpu())
    return [live, moved]
