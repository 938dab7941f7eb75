"""Replay: put checkpoint tensors into the live model by the plan.

One `Update` takes the tensors of one plan, in one call or many; a module that is computed after
loading is finished as soon as its last tensor is there, so at most one is held in checkpoint form
when all tensors come at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_wt_plugin.errors import PlanError, RequestError
from vllm_wt_plugin.wire.buckets import Piece
from vllm_wt_plugin.worker.plan.batch import Batch, Moving
from vllm_wt_plugin.worker.plan.blueprint import TensorForm, tensors_of_module
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.ops import storage_key
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.process import changed, install, rerun
from vllm_wt_plugin.worker.plan.segment import Region, Segment, narrow, source_view

Tensors = Mapping[str, torch.Tensor]
Place = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape, strides
MANY = 32  # copies, that take longer one by one than to be described in a table (0.8 ms)


def check_equal(plan: LoadPlan, tensors: Tensors, written: Collection[str] = ()) -> None:
    """Two names that end in one place must bring the same bits; reads both, writes nothing.

    `written`: names that are in live memory already, as they came.
    """
    for a, b in plan.must_equal:
        x, y = (_value(plan, tensors, written, s) for s in (a, b))
        if x is None or y is None:
            continue
        if a.name in tensors and b.name in tensors:
            same = x.dtype == y.dtype and torch.equal(x, y)
        else:  # one of them has the model's dtype by now
            dtype = min(x.dtype, y.dtype, key=lambda d: d.itemsize)
            same = torch.equal(x.to(dtype), y.to(dtype))
        if a.dest != b.dest or not same:
            raise differ(a.name, b.name)


def _value(
    plan: LoadPlan, tensors: Tensors, written: Collection[str], seg: Segment
) -> torch.Tensor | None:
    if seg.name in tensors:
        return source_view(tensors[seg.name], seg.source)
    module, name = seg.target
    if seg.name in written and module in plan.in_place:
        return seg.dest.of_tensor(tensors_of_module(plan.modules[module])[name])
    return None


def check_filled(plan: LoadPlan, tensors: Tensors, filled: Mapping[Place, str]) -> None:
    """The same for an update in parts: what another name has `filled` must get the same bits."""
    if not filled:
        return  # to look at each of an MoE's tensors takes longer than to copy them
    for name, place, source in _copies(plan, tensors):
        other = filled.get(_key(place), name)
        if other != name and not torch.equal(place, source.to(place.dtype)):
            raise differ(name, other)


def places(plan: LoadPlan, tensors: Tensors) -> dict[Place, str]:
    """What a part of an update fills, and by which name."""
    return {_key(place): name for name, place, _ in _copies(plan, tensors)}


def _copies(plan: LoadPlan, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Of each plain copy: the name, the live place, the values."""
    for module in plan.in_place & plan.segments.keys():
        own = tensors_of_module(plan.modules[module])
        for seg in plan.segments[module]:
            if seg.name in tensors:
                source = source_view(tensors[seg.name], seg.source)
                yield seg.name, seg.dest.of_tensor(own[seg.target[1]]), source


def _key(place: torch.Tensor) -> Place:
    return place.data_ptr(), tuple(place.shape), place.stride()


def differ(a: str, b: str) -> PlanError:
    """Of two names that are one tensor."""
    return PlanError(
        f"{a} and {b} are one tensor in the served model, "
        "and the update brings different values for them",
        where=a,
        next_step="push tied values, or start the engine from an untied checkpoint",
    )


class Replay:
    """A plan's copies for fixed source tensors: built once, run every push.

    Holds the tensors it reads, and the live ones; asynchronous on the current stream.
    """

    def __init__(self, plan: LoadPlan, tensors: Tensors) -> None:
        self._plan, self._tensors = plan, tensors
        self._views: dict[str, list[_Copy]] = {}  # of processed modules
        self._many: dict[str, Moving] = {}  # of those of many copies
        self.modules = {m for m in plan.in_place if m in plan.segments}
        pairs, self._loose = [], list[tuple[torch.Tensor, _Copy]]()
        for module in sorted(self.modules):
            live = tensors_of_module(plan.modules[module])
            for copy in self._segments(module):
                dest = copy.dest.of_tensor(live[copy.tensor])
                if copy.part is None:
                    pairs.append((dest, copy.source))
                else:
                    self._loose.append((dest, copy))
        self._batch = Batch(pairs)

    def run(self) -> None:
        self._batch.run()
        for dest, copy in self._loose:
            copy.run(dest)

    def stage(self, module: str, into: dict[str, torch.Tensor]) -> None:
        """Fill `into`, a processed module's tensors in checkpoint form. They are new each time.
        One by one the copies of an MoE, some for each expert, take as long as vLLM's processing:
        they are described once, and moved to where the tensors lie."""
        with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameters ask in each call
            bases = [t.data_ptr() for t in into.values()]
            if module in self._many and self._many[module].run(bases):
                return
            copies = self._views.get(module) or self._segments(module)
            rows = [(c.dest.of_tensor(into[c.tensor]), c) for c in copies]
            plain = [(dest, c.source) for dest, c in rows if c.part is None]
            for dest, copy in rows:
                if copy.part is not None or len(plain) < MANY:
                    copy.run(dest)
            if len(plain) >= MANY:
                batch = Batch(plain)
                batch.run()
                moving = batch.moving(bases) if len(plain) == len(rows) else None
                if moving is not None:
                    self._many[module] = moving
                    return
            self._views[module] = copies

    def _segments(self, module: str) -> list[_Copy]:
        out = []
        for seg in self._plan.segments[module]:
            tensor = self._tensors[seg.name]
            view = source_view(tensor, seg.source)
            fixed = storage_key(view) == storage_key(tensor)
            source, part = (view, None) if fixed else (tensor, seg.source)
            out.append(_Copy(seg.target[1], seg.dest, source, part))
        return out


@dataclass(frozen=True, slots=True)
class _Copy:
    """Of one segment: where it ends in a module, and what ends there."""

    tensor: str
    dest: Region
    source: torch.Tensor
    part: Region | None  # of the source, where no view expresses it

    def run(self, dest: torch.Tensor) -> None:
        dest.copy_(self.source if self.part is None else source_view(self.source, self.part))


class Update:
    """Writes one plan's tensors into the live model. Between `receive` calls modules may be mixed.

    Called on every rank, blocking, in the worker's main thread while no step runs.
    """

    def __init__(self, host: Host, plan: LoadPlan) -> None:
        self.host, self.plan = host, plan
        self.received: set[str] = set(plan.empty)
        self._all = False  # every name at once: no need to count them
        self.touched: set[str] = set()
        self._modules = plan.modules
        self._staged: dict[str, dict[str, torch.Tensor]] = {}
        self._rows: dict[str, int] = {}  # of tensors that come in pieces
        self._held: dict[str, torch.Tensor] = {}  # for the loader, until all of them are there
        needs = {m: {s.name for s in plan.segments.get(m, [])} for m in plan.processed}
        self._wait: dict[str, set[str]] = {
            m: names - self.received for m, names in needs.items() if names - self.received
        }

    def assume(self, names: AbstractSet[str]) -> None:
        """Another update wrote these already, all of them into modules that are in place."""
        self.received |= names
        self.touched |= {m for n in names for m, _ in self.plan.by_name.get(n, ())}

    @torch.no_grad()
    def receive_all(self, tensors: Tensors, replay: Replay) -> None:
        """Every tensor of the plan at once; they stay valid until `finish`."""
        replay.run()  # first: a GPU is at work while the host does the rest
        self._all = True
        self.touched |= replay.modules
        if self._wait:
            with self.host.context():
                for module, missing in self._wait.items():
                    if missing:
                        replay.stage(module, into := self._form(module))
                        missing.clear()
                        self._install(module, into)
        self._held |= {n: tensors[n] for n in self.plan.opaque_names}

    @torch.no_grad()
    def receive(self, tensors: Tensors, *, lasting: bool) -> None:
        """Copy `tensors` in. `lasting`: they stay valid until `finish` (no copy is kept)."""
        with self.host.context():
            for module, segments in self.plan.segments.items():
                if not any(s.name in tensors for s in segments):
                    continue
                if module in self.plan.in_place:
                    self._copy(module, tensors, tensors_of_module(self._modules[module]))
                elif module in self.plan.processed:
                    self._stage(module, tensors)
            for name in self.plan.opaque_names & tensors.keys():
                self._held[name] = tensors[name] if lasting else tensors[name].clone()
            self.received |= tensors.keys()

    @torch.no_grad()
    def receive_pieces(
        self, pieces: list[tuple[Piece, torch.Tensor]], known: Batch | None
    ) -> Batch:
        """Rows of tensors, in a buffer that is filled anew afterwards. Returns the batch of the
        plain copies, to be given as `known` when the same pieces come at the same addresses."""
        plain = []
        with self.host.context():
            for piece, rows in pieces:
                name = piece.spec.name
                for module, seg in self.plan.by_name.get(name, ()):
                    staged = module in self.plan.processed
                    if staged or (known is None and module in self.plan.in_place):
                        into = self._staging(module) if staged else self._live(module)
                        for part in narrow(seg, piece.spec.shape, piece.row, piece.rows):
                            dest = part.dest.of_tensor(into[part.target[1]])
                            source = source_view(rows, part.source)
                            # Staging memory is new each time: only live places can be kept.
                            dest.copy_(source) if staged else plain.append((dest, source))
                if name in self.plan.opaque_names:
                    self._hold(piece, rows)
            batch = Batch(plain) if known is None else known
            batch.run()
            for piece, _ in pieces:
                self._arrived(piece)
        return batch

    @torch.no_grad()
    def repeat(self, pieces: list[Piece], known: Batch) -> None:
        """`receive_pieces` of pieces that take nothing but their copies. Does not wait."""
        known.run()
        for piece in pieces:
            self._arrived(piece)

    def _hold(self, piece: Piece, rows: torch.Tensor) -> None:
        if piece.spec.name not in self._held:
            self._held[piece.spec.name] = rows.new_empty(piece.spec.shape)
        whole = self._held[piece.spec.name]
        part = whole[piece.row : piece.row + piece.rows] if whole.dim() else whole
        part.copy_(rows)

    def _arrived(self, piece: Piece) -> None:
        """Count rows; a tensor that is whole may complete the modules that wait for it."""
        name = piece.spec.name
        total = piece.spec.shape[0] if piece.spec.shape else 1
        self._rows[name] = self._rows.get(name, 0) + piece.rows
        if self._rows[name] < total:
            return
        self.received.add(name)
        for module, seg in self.plan.by_name.get(name, ()):
            self.touched.add(module)
            if module in self._wait:
                self._wait[module].discard(seg.name)
                if not self._wait[module] and module in self._staged:
                    self._install(module, self._staged.pop(module))

    def _staging(self, module: str) -> dict[str, torch.Tensor]:
        if module not in self._staged:
            self._staged[module] = self._form(module)
        return self._staged[module]

    def _live(self, module: str) -> dict[str, torch.Tensor]:
        return tensors_of_module(self._modules[module])

    @torch.no_grad()
    def finish(self) -> None:
        """Run what needs everything: ties, the loader's share, hooks that read other modules."""
        plan = self.plan
        missing = set() if self._all else plan.specs.keys() - self.received
        if missing:
            raise RequestError(
                f"{len(missing)} announced tensors never came: {', '.join(sorted(missing)[:20])}",
                where=min(missing),
                next_step="send every tensor before finishing the update",
            )
        # A rerun touches its own module only: where none is due now, none will be.
        late = any(reads & self.touched for reads in plan.late.values())
        tied = plan.processed.keys() - self._wait.keys()  # computed from what others brought
        if not (plan.opaque or tied or late):
            return
        with self.host.context():
            if plan.opaque:
                self._load_opaque()
            for module in tied:
                self._install(module, self._form(module))
            hooks = self.host.late_hooks()
            for name, reads in plan.late.items():
                if reads & self.touched:
                    rerun(name, *hooks[name])
                    self.touched.add(name)

    def _copy(self, module: str, tensors: Tensors, into: dict[str, torch.Tensor]) -> None:
        self.touched.add(module)
        for seg in self.plan.segments[module]:
            if seg.name in tensors:
                source = source_view(tensors[seg.name], seg.source)
                seg.dest.of_tensor(into[seg.target[1]]).copy_(source)

    def _stage(self, module: str, tensors: Tensors) -> None:
        if not self._wait.get(module):
            return  # installed
        self._copy(module, tensors, self._staging(module))
        self._wait[module] -= tensors.keys()
        if not self._wait[module]:
            self._install(module, self._staged.pop(module))

    def _form(self, module: str) -> dict[str, torch.Tensor]:
        """The module's tensors in checkpoint form, real; what no segment writes keeps its value."""
        m = self._modules[module]
        form = self.host.blueprint.form(m)
        if form is None:
            return {}
        tensor = self.host.blueprint.tied(
            lambda m, n, f: self._scratch(tensors_of_module(m).get(n), f)
        )
        out = {n: tensor(f) for n, f in form.tensors.items()}
        for fill in self.plan.fills.get(module, []):
            fill.dest.of_tensor(out[fill.target[1]]).fill_(fill.value)
        return out

    def _scratch(self, live: torch.Tensor | None, form: TensorForm) -> torch.Tensor:
        t = form.empty(self.host.device)
        if live is not None and form.same_geometry(live):
            t.data.copy_(live)
        return t

    def _install(
        self, name: str, tensors: dict[str, torch.Tensor], attrs: dict[str, Any] | None = None
    ) -> None:
        m = self._modules[name]
        self.touched.add(name)
        install(name, m, self.host.blueprint, self.host.hook(m), tensors, attrs or {})

    def _load_opaque(self) -> None:
        """Give the loader its names, with real memory in the opaque modules and none elsewhere."""
        modules = {self._modules[n]: n for n in self.plan.opaque}
        forms = {m: self.host.blueprint.form(m) for m in modules}
        real = {f.key for form in forms.values() if form for f in form.tensors.values()}
        live = {m: tensors_of_module(m) for m in self._modules.values()}

        def make(module: nn.Module, tensor: str, form: TensorForm) -> torch.Tensor:
            if form.key not in real:
                return form.empty("meta")
            return self._scratch(live[module].get(tensor), form)

        loaded = {}
        with self.host.blueprint.checkpoint_form(self.host.model, make):
            before = {m: dict(m.__dict__) for m in modules}
            # Contiguous, as checkpoint files give them: loaders use `view`.
            given = ((n, self._held[n].contiguous()) for n in self.plan.specs if n in self._held)
            self.host.load(given)
            for m in modules:
                loaded[m] = tensors_of_module(m), changed(before[m], m.__dict__)
        self._held.clear()
        for m, (tensors, attrs) in loaded.items():
            self._install(modules[m], tensors, attrs)
