"""A push of patches on one worker.

prepare (check) → apply (write, keep the old bits, compare checksums) → finish; or undo
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch

from vllm_wt_plugin.errors import (
    EngineDirty,
    HandleError,
    PlanError,
    RequestError,
    VersionMismatch,
)
from vllm_wt_plugin.sparse.checksum import checksum_runs
from vllm_wt_plugin.sparse.patch import WORDS, Group, grouped, received
from vllm_wt_plugin.wire.agreement import not_the_trainers
from vllm_wt_plugin.wire.messages import PlanReport
from vllm_wt_plugin.wire.moved import Moved
from vllm_wt_plugin.wire.nccl import ReceivePatches
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import Part, PatchPush, Section, layout
from vllm_wt_plugin.wire.sparse import parts
from vllm_wt_plugin.worker.known import Known, Patched, Timed
from vllm_wt_plugin.worker.places import Places
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.update import Update


def patchable(
    known: Known, push: PatchPush, version: str, dirty: str, timed: Timed
) -> tuple[Patched, bool]:
    """What `push` names of weights at `version`, if they can take it, and whether it is new."""
    if dirty:
        raise EngineDirty(
            f"patches need whole weights to start from, these are DIRTY: {dirty}",
            next_step="push a complete dense update",
        )
    if push.base_version not in (None, version):
        raise VersionMismatch(
            f"the patches start from version {push.base_version!r}, the engine holds {version!r}",
            next_step="push dense",
        )
    with timed("plan"):
        return known.patched(push)


def open_patches(
    known: Known,
    push: PatchPush,
    version: str,
    dirty: str,
    timed: Timed,
    memory: dict[str, torch.Tensor] | None,
) -> tuple[PatchUpdate, PlanReport | None]:
    """The update that `push` asks of weights at `version`, checked; the report of a new plan.
    `memory`: its tensors, where they have come by broadcast."""
    patched, new = patchable(known, push, version, dirty, timed)
    if memory is None:
        with timed("wait"):
            memory = known.patch_memory(push)
    with timed("check"):
        update = PatchUpdate(known.host, patched, push, memory)
    return update, patched.places.plan.report if new else None


class Arriving:
    """Patches that come through a group into `tensors`, by name; nothing live is written before
    all are here and were checked. `memory` takes bucket after bucket: our trainer sends its
    buffer in parts, vLLM's every tensor whole."""

    writes = ahead = False

    def __init__(self, verb: ReceivePatches, patched: Patched, device: torch.device) -> None:
        push = verb.push
        if push.form == "broadcast":
            at = layout(patched.widths, push.num_updates_list, push.whole)
            buffer = torch.empty(max(at.nbytes, 1), dtype=torch.uint8, device=device)
            self.tensors = {"": buffer}
            self.memory = list(buffer.split(push.bucket_bytes))
        else:
            self.tensors = {
                name: torch.empty(n, dtype=getattr(torch, dtype), device=device)
                for name, dtype, n in parts(push, narrow=verb.narrow)
            }
            self.memory = [t.view(torch.uint8) for t in self.tensors.values() if t.numel()]
        self.sizes = [m.numel() for m in self.memory]
        self._left = len(self.memory)

    def receive(self) -> None:
        """One more is here."""
        self._left -= 1

    @property
    def complete(self) -> bool:
        return not self._left


class PatchUpdate:
    """One push of patches under way. `undo` is exact, and possible after commit too, unless
    whole tensors without a shadow were written: then it is not `exact`."""

    def __init__(
        self, host: Host, patched: Patched, push: PatchPush, memory: dict[str, torch.Tensor]
    ) -> None:
        self._host, self._places, self._push = host, patched.places, push
        self._alone = patched.places.alone  # found here, not in the pause
        specs, places = patched.specs, patched.places
        groups, self._sent = (_in_tensors if push.form == "tensors" else _in_buffer)(
            push, patched, memory
        )
        self._scatters = [
            (group, places.scatter(group)) for one in groups for group in _by_device(one, places)
        ]
        self._check_whole()
        came = [t for g, _ in self._scatters for t in (g.indices, g.values)]
        self.moved = Moved(
            "sparse",
            sum(t.nbytes for t in (*came, *self._sent.values())),
            sum(push.num_updates_list) + sum(s.numel for s in push.whole),
            places.plan.report.elements,
        )
        self._patched = {s.name for s in specs} & places.whole.keys() if places.whole else set()
        self.wrote = self._processed = False

    @cached_property
    def _want(self) -> dict[str, int]:
        """By how much each checksum is to move; not asked for where all are right at once."""
        return dict(zip(self._push.names, self._push.sums, strict=False))

    @property
    def exact(self) -> bool:
        """Whether `undo` can put back all that was written."""
        return not (self._sent and self._processed)

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

    def prepare(self) -> None:
        """Everything that can be wrong with what came; writes nothing live. Raises RequestError
        naming the parameter, TransferError for tensors in full that are not the trainer's."""
        for _, ways in self._scatters:
            ways.check()
        if wrong := self._arrived_wrong():
            raise not_the_trainers(wrong, "nothing was written; push dense")

    def _arrived_wrong(self) -> list[str]:
        """Tensors in full that are not the trainer's; where it says what they add up to."""
        if not self._push.whole_sums:
            return []
        have = checksum_runs([(n, t, 0) for n, t in self._sent.items()])
        rows = zip(self._sent, have, self._push.whole_sums, strict=True)
        return [name for name, a, b in rows if a != b]

    @torch.no_grad()
    def apply(self) -> dict[str, list[Part]]:
        """Write the patches, once.

        Returns the parts of tensors that no rank holds whole, for all ranks to be added up.
        Raises TransferError where the engine's old values, or what arrived, are not the trainer's:
        to be undone.
        """
        wrong, parts = list[str](), dict[str, list[Part]]()
        self.wrote = True
        for group, ways in self._scatters:
            sums = ways.swap()
            if self._alone and sums == self._push.sums:
                continue
            want = self._want
            for spec, have in zip(group.specs, sums, strict=True):
                if spec.name not in want:
                    continue
                every, part = self._places.held(spec.name)
                if part and not every:
                    parts[spec.name] = [(part, have)]
                elif have != (want[spec.name] if every else 0):
                    wrong.append(spec.name)
        if wrong:
            raise not_the_trainers(wrong, "they are taken back; push dense")
        return parts

    @torch.no_grad()
    def finish(self) -> None:
        """What is not a scatter goes through vLLM's processing, of its modules only. After the
        checksums of all ranks were compared: tensors in full are not taken back."""
        self._processed = True
        self._process(self._sent)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the old bits back."""
        if self.wrote:
            for _, ways in reversed(self._scatters):
                ways.undo()
            if self._processed:
                self._process({})
        self.wrote = self._processed = False

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


_Came = tuple[list[Group], dict[str, torch.Tensor]]  # patches, and tensors in full


def _in_buffer(push: PatchPush, patched: Patched, memory: dict[str, torch.Tensor]) -> _Came:
    buffer = next(iter(memory.values()))
    if len(memory) != 1 or buffer.dtype != torch.uint8 or buffer.dim() != 1:
        raise HandleError("patches come in one buffer of bytes", where="registration")
    plan = layout(patched.widths, push.num_updates_list, push.whole)
    if plan.nbytes > buffer.numel():
        raise HandleError(
            f"the patches need {plan.nbytes} bytes, their buffer has {buffer.numel()}",
            where="registration",
        )
    whole = {
        spec.name: buffer[at : at + spec.nbytes].view(getattr(torch, spec.dtype)).view(spec.shape)
        for spec, at in zip(push.whole, plan.whole_at, strict=True)
    }
    return [_group(push, patched.specs, s, buffer) for s in plan.sections], whole


def _in_tensors(push: PatchPush, patched: Patched, memory: dict[str, torch.Tensor]) -> _Came:
    if push.whole:
        raise RequestError("tensors in full come in a buffer only", where="$.whole")
    return grouped(received(push, memory), {s.name: s for s in patched.specs}), {}


def _group(
    push: PatchPush, specs: tuple[ParamSpec, ...], s: Section, buffer: torch.Tensor
) -> Group:
    index = torch.int32 if s.index == 4 else torch.int64
    counts, every = push.num_updates_list, len(s.members) == len(specs)
    return Group(
        specs if every else tuple(specs[i] for i in s.members),
        tuple(counts if every else (counts[i] for i in s.members)),
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
