"""Sparse pushes: the changes in one buffer, to every replica that holds the last version.

Snapshot.changes ─▶ PatchSender.load (once) ─▶ PatchSender.send (to each replica)
                                            └▶ Broadcaster.patch (to all at once)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import torch

from vllm_wt_plugin.errors import UnknownRegistration
from vllm_wt_plugin.sparse.checksum import checksum_runs
from vllm_wt_plugin.sparse.patch import SparseWeightPatch
from vllm_wt_plugin.trainer.client import Client
from vllm_wt_plugin.trainer.delta import Changes
from vllm_wt_plugin.transport.ipc import Exporter
from vllm_wt_plugin.transport.layout import BaseExporter
from vllm_wt_plugin.transport.patches import share
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import PatchPush, layout, widths

SPARE = 1.5  # room that the buffer has beyond its first use, so that it is seldom made anew


class PatchSender:
    """The buffer of one trainer and what its replicas know of it. `close()` frees it.

    `exporter` is its own: what it shares is this buffer alone; None: the buffer is not shared.
    """

    def __init__(self, exporter: BaseExporter | None) -> None:
        self.exporter = exporter
        self.buffer: torch.Tensor | None = None
        self.data: torch.Tensor | None = None  # the part of it that `load` has filled
        self.registration: Registration | None = None
        self._known: dict[str, str] = {}  # replica → the buffer's registration it holds
        self.push: PatchPush | None = None

    def load(self, changes: Changes, empty: ParamSpec, base: str, version: str, owner: str) -> None:
        """Lay the changes out in the buffer. `empty` is named where nothing has changed."""
        specs = tuple(s for d in changes.diffs for s in d.group.specs)
        counts = [n for d in changes.diffs for n in d.group.counts]
        sums = [x for d in changes.diffs for x in d.sums]
        if not specs and not changes.whole:
            specs, counts, sums = (empty,), [0], [0]
        whole = [s for s, _ in changes.whole]
        places = layout(widths(specs), counts, whole)
        buffer = self._room(max(places.nbytes, 1), _device(changes))
        for section in places.sections:
            i, v = section.indices_at, section.values_at
            for d in changes.diffs:
                g = d.group
                if (g.values.element_size(), g.indices.element_size()) == (
                    section.word,
                    section.index,
                ):
                    buffer[i : i + g.indices.nbytes].copy_(g.indices.view(torch.uint8))
                    buffer[v : v + g.values.nbytes].copy_(g.values.view(torch.uint8))
                    i, v = i + g.indices.nbytes, v + g.values.nbytes
        for (spec, t), at in zip(changes.whole, places.whole_at, strict=True):
            buffer[at : at + spec.nbytes].view(t.dtype).view(t.shape).copy_(t)
        self.data = buffer[: max(places.nbytes, 1)]
        whole_sums = []
        if self.exporter is None:  # over a network; memory that is shared needs no proof
            whole_sums = checksum_runs([(s.name, t, 0) for s, t in changes.whole])
        else:
            self.registration, _ = self.exporter.register([("patches", buffer)])
            self.exporter.refresh()
        self.push = PatchPush(
            names=[s.name for s in specs],
            dtype_names=[s.dtype for s in specs],
            shapes=[s.shape for s in specs],
            num_updates_list=counts,
            registration="" if self.registration is None else self.registration.id,
            base_version=base,
            whole=whole,
            sums=sums,
            whole_sums=whole_sums,
            version=version,
            owner=owner,
        )

    def _room(self, nbytes: int, device: torch.device) -> torch.Tensor:
        b = self.buffer
        if b is None or b.numel() < nbytes or b.device != device:
            b = self.buffer = torch.empty(int(nbytes * SPARE), dtype=torch.uint8, device=device)
        return b

    def send(self, client: Client) -> Outcome:
        """What `load` laid out, in one request. Raises what the replica says."""
        push, registration = self.push, self.registration
        if push is None or registration is None:
            raise RuntimeError("load() comes first")
        full = msgspec.structs.replace(push, register=registration)
        try:
            known = self._known.get(client.name) == registration.id
            done = client.push(push if known else full)
        except UnknownRegistration:
            done = client.push(full)
        self._known[client.name] = registration.id
        return done

    def forget(self, name: str) -> None:
        self._known.pop(name, None)

    def close(self) -> None:
        if self.exporter is not None:
            self.exporter.close()
        self.buffer = self.data = self.push = None


def send_patches(
    post: Callable[[dict[str, Any]], object], patches: Iterable[SparseWeightPatch]
) -> None:
    """Any patches with a `full_shape`, as one part of an open update: `post` gets its
    `update_info`, and returns once the workers have taken it. The tensors are free again on
    return. Raises what is wrong, naming the parameter."""
    with Exporter() as exporter:
        post(msgspec.to_builtins(share(patches, exporter)))


def _device(changes: Changes) -> torch.device:
    for d in changes.diffs:
        return d.group.values.device
    return changes.whole[0][1].device if changes.whole else torch.device("cpu")
