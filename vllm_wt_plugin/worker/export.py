"""Live weights shown to a trainer on this host: by the load plan, each checkpoint parameter as a
view of the memory that vLLM computes with. Every parameter or none.

    specs → plan → place (one strided view each) → LiveExporter → Registration
"""

from __future__ import annotations

import base64
import gc
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from vllm_wt_plugin.errors import NoUpdate, PlanError, UnsupportedVLLM
from vllm_wt_plugin.transport import shm
from vllm_wt_plugin.transport.cuda import CudaExport
from vllm_wt_plugin.transport.ipc import LiveExporter
from vllm_wt_plugin.wire import bridge
from vllm_wt_plugin.wire.handles import ShmStorage
from vllm_wt_plugin.wire.messages import Export
from vllm_wt_plugin.wire.params import check_specs
from vllm_wt_plugin.wire.views import Box, NoView, view_of
from vllm_wt_plugin.worker.known import Known
from vllm_wt_plugin.worker.plan.blueprint import tensors_of_module
from vllm_wt_plugin.worker.plan.ops import storage_key
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.segment import Target
from vllm_wt_plugin.worker.plan.update import Update


@dataclass(frozen=True)
class _Place:
    """One checkpoint tensor: a view of a live tensor. Offsets count from the storage's start."""

    target: Target
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Attached:
    """A trainer that maps the weights, while it holds `presence` (None: until it is detached)."""

    owner: str
    presence: ShmStorage | None
    plan: LoadPlan

    @property
    def lives(self) -> bool:
        return self.presence is None or shm.owned(self.presence)


@dataclass
class Exports:
    """The trainers that are attached to this worker. Called between steps only."""

    known: Known
    world_size: int  # workers of all engines together
    _attached: dict[str, Attached] = field(default_factory=dict)
    _exporter: LiveExporter | None = None

    def attached(self) -> dict[str, str]:
        """{id: owner} of the trainers that live."""
        living = {k: a for k, a in self._attached.items() if a.lives}
        self._attached = living
        return {key: a.owner for key, a in living.items()}

    def detach(self, key: str) -> None:
        """Forget one trainer, or (`""`) all. The weights stay where they are."""
        for known in [key] if key else list(self._attached):
            self._attached.pop(known, None)

    def find(self, key: str) -> Attached:
        """Raises NoUpdate unless this trainer (`""`: any; the last one) is attached."""
        living = list(self.attached())
        if not living or (key and key not in living):
            raise NoUpdate(
                "no such trainer is attached to these weights",
                next_step="POST /bridge/export_cuda_ipc first",
            )
        return self._attached[key or living[-1]]

    def export(self, verb: Export) -> bridge.Exported:
        """Attach a trainer.

        Blocking; moves CPU weights to shared memory once. Raises PlanError with every parameter
        that has no place of its own, and changes nothing then.
        """
        if self.world_size > 1:
            raise UnsupportedVLLM(
                f"the bridge takes one worker, this engine has {self.world_size}",
                where="tensor_parallel_size, pipeline_parallel_size, data_parallel_size",
                next_step="serve with one GPU, or push with WeightSync",
            )
        specs = self.known.host.checkpoint() if verb.specs is None else verb.specs
        check_specs(specs)
        plan = self.known.plan(specs, complete=True)
        skipped = plan.report.ignored if verb.specs is None else {}
        places = _places(plan, [n for n in plan.specs if n not in skipped])
        if self._exporter is None:
            self._exporter = LiveExporter()
        targets = dict.fromkeys(p.target for p in places.values())
        live = [(".".join(t), _tensor(plan, t)) for t in targets]
        _move_to_shared_memory(live, self._exporter.homes)
        views = {name: _view(plan, place) for name, place in places.items()}
        registration, _ = self._exporter.register(views.items())
        self._exporter.refresh()
        self._attached[verb.attached] = Attached(verb.owner, verb.presence, plan)
        return bridge.Exported(
            verb.attached,
            registration,
            {name: _mapping(views[name], place.target) for name, place in places.items()},
            _live_tensors(live, self._exporter),
        )

    def finish(self, attached: Attached) -> None:
        """The trainer has written: compute anew what vLLM derives from the weights (MLA)."""
        update = Update(self.known.host, attached.plan)
        update.assume(attached.plan.specs.keys())
        update.finish()


def _places(plan: LoadPlan, names: list[str]) -> dict[str, _Place]:
    found: dict[str, _Place] = {}
    wrong: dict[str, str] = {}
    for a, b in plan.must_equal:
        wrong[a.name] = f"it shares its memory with {b.name}: tie the two in the trainer's model"
    for name in names:
        try:
            found[name] = _place(plan, name)
        except NoView as exc:
            wrong.setdefault(name, str(exc))
    if wrong:
        _refuse(wrong)
    return found


def _refuse(wrong: dict[str, str]) -> NoReturn:
    rows = [f"{name}: {why}" for name, why in wrong.items()]
    raise PlanError(
        f"{len(rows)} parameters cannot be trained in vLLM's memory: " + "; ".join(rows[:20]),
        where=next(iter(wrong)),
        next_step="serve without quantisation (on CPU with WT_CPU_INPLACE=1), or push copies with "
        "WeightSync",
    )


def _place(plan: LoadPlan, name: str) -> _Place:
    """Where one checkpoint tensor lives; NoView says why it is nowhere in one piece."""
    spec, rows = plan.specs[name], plan.by_name.get(name, [])
    if why := plan.report.ignored.get(name):
        raise NoView(f"vLLM has no such parameter ({why})")
    for module, _ in rows:
        if module in plan.opaque or module in plan.processed:
            raise NoView(
                f"{module} computes with another form of it "
                f"({plan.opaque.get(module) or plan.processed[module]})"
            )
    if not rows:
        raise NoView("it goes through vLLM's loader" if name in plan.opaque_names
                     else "the served model has no such parameter")  # fmt: skip
    boxes, homes = [], dict[int, Target]()
    for _, seg in rows:
        live = _tensor(plan, seg.target)
        if str(live.dtype).removeprefix("torch.") not in _KINDS:
            raise NoView(f"{live.dtype} cannot be trained")
        homes.setdefault(storage_key(live), seg.target)
        src, dest = seg.source, seg.dest
        offset = dest.offset + int(live.storage_offset())
        boxes.append(Box(src.size, src.offset, src.stride, offset, dest.stride))
    if len(homes) > 1:
        where = ", ".join(".".join(t) for t in homes.values())
        raise NoView(f"it lies in several tensors of vLLM: {where}")
    offset, stride = view_of(spec.shape, boxes)
    return _Place(rows[0][1].target, spec.shape, offset, stride)


_KINDS = {"float64", "float32", "bfloat16", "float16"}


def _tensor(plan: LoadPlan, target: Target) -> torch.Tensor:
    return tensors_of_module(plan.modules[target[0]])[target[1]]


def _view(plan: LoadPlan, place: _Place) -> torch.Tensor:
    live = _tensor(plan, place.target).detach()
    return live.as_strided(place.shape, place.stride, place.offset)


def _move_to_shared_memory(
    live: list[tuple[str, torch.Tensor]], homes: dict[int, shm.Home]
) -> None:
    """Give every CPU weight a home in shared memory, unless it has one; the old memory is freed.

    Whatever tensor of this process lies on that memory follows, and keeps its identity: a layer's
    own attribute, a captured view, a trainer's registered copy.
    """
    todo = {
        storage_key(t): (t.untyped_storage(), name)
        for name, t in live
        if t.device.type == "cpu" and t.numel() and t.untyped_storage().data_ptr() not in homes
    }
    if not todo:
        return
    users = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    users = [t for t in users if t.layout == torch.strided and storage_key(t) in todo]
    moved = {key: shm.Home(storage, name) for key, (storage, name) in todo.items()}
    homes |= {home.memory.data_ptr(): home for home in moved.values()}
    for t in users:
        new = torch.empty(0, dtype=t.dtype)
        home = moved[storage_key(t)]
        t.data = new.set_(home.memory, int(t.storage_offset()), t.size(), t.stride())


def _mapping(view: torch.Tensor, target: Target) -> bridge.Mapping:
    return bridge.Mapping(
        ".".join(target), _name(view.dtype), str(view.device), tuple(view.shape), view.stride(),
        int(view.storage_offset()),
    )  # fmt: skip


def _live_tensors(
    live: list[tuple[str, torch.Tensor]], exporter: LiveExporter
) -> dict[str, bridge.LiveTensor]:
    exports = exporter.exports()
    out = {}
    share: Any
    for name, t in live:
        export = exports[t.untyped_storage().data_ptr()]
        if isinstance(export, CudaExport):
            share = tuple(_b64(x) if isinstance(x, bytes) else x for x in export.torch_handle)
        else:
            handle = export.handle
            segment = handle.name if isinstance(handle, ShmStorage) else ""
            share = (-1, _b64(segment.encode()), handle.nbytes, 0, "", 0, "", False)
        out[name] = bridge.LiveTensor(
            _name(t.dtype), str(t.device), tuple(t.shape), t.stride(), int(t.storage_offset()),
            share,
        )  # fmt: skip
    return out


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
