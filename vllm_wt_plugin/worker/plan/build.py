"""Make a load plan: record → verify → classify → check. By behaviour, not by class names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from vllm_wt_plugin.errors import PlanError
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.blueprint import TensorForm, tensors_of_module
from vllm_wt_plugin.worker.plan.coverage import check_coverage
from vllm_wt_plugin.worker.plan.host import Host, form_of
from vllm_wt_plugin.worker.plan.ops import storage_key
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.process import made_by_processing, probe, trace
from vllm_wt_plugin.worker.plan.record import Recording, record
from vllm_wt_plugin.worker.plan.report import describe, head_again
from vllm_wt_plugin.worker.plan.segment import Fill, Segment, Target, overlaps
from vllm_wt_plugin.worker.plan.verify import disagreements

FLOATS = {"float64", "float32", "bfloat16", "float16"}  # casts between these keep the meaning


def build(host: Host, specs: Iterable[ParamSpec], *, complete: bool = True) -> LoadPlan:
    """Record and classify. Blocking, on every rank, between steps; moves no weights.

    `complete`: `specs` must cover every parameter of the model. Raises PlanError for what this
    rank alone can know to be wrong; names that end nowhere are in the report, for all ranks to
    be compared.
    """
    with host.context():
        return _build(host, tuple(specs), complete)


def _build(host: Host, specs: tuple[ParamSpec, ...], complete: bool) -> LoadPlan:
    recording = record(
        host.model, host.blueprint, host.load, specs, lambda name: head_again(name, host)
    )
    plan = LoadPlan({s.name: s for s in specs})
    _take(plan, recording)
    for module, why in disagreements(host, plan.specs, recording).items():
        plan.opaque.setdefault(module, why)
    live = _Live(host)
    plan.modules = live.modules
    _mirror(plan, host, live)
    _conflicts(plan, host, live)
    _check_dtypes(plan, host)
    _classify(plan, host, live)
    check_coverage(plan, host, recording, complete)
    plan.report = describe(plan, host)
    return plan


def _take(plan: LoadPlan, rec: Recording) -> None:
    for seg in rec.segments:
        plan.segments.setdefault(seg.target[0], []).append(seg)
    for fill in rec.fills:
        plan.fills.setdefault(fill.target[0], []).append(fill)
    for (module, tensor), why in rec.opaque_targets.items():
        plan.opaque.setdefault(module, f"{tensor}: {why}")
    plan.opaque_names = set(rec.opaque_names) | set(rec.dropped)
    for module, rows in plan.segments.items():
        by_tensor: dict[str, list[Segment]] = defaultdict(list)
        for seg in rows:
            by_tensor[seg.target[1]].append(seg)
            if seg.name in rec.opaque_names:
                plan.opaque.setdefault(module, f"{seg.name} is {rec.opaque_names[seg.name]}")
        for rows_of_tensor in by_tensor.values():
            for a, b in overlaps(rows_of_tensor):
                if a.name != b.name and a.dest == b.dest:
                    plan.must_equal.append((a, b))
                else:
                    plan.opaque.setdefault(module, f"{a.name} and {b.name} overlap")


class _Live:
    """The live model: modules by name, and which storages belong to which modules."""

    def __init__(self, host: Host) -> None:
        self.modules = dict(host.model.named_modules())
        self.owners: dict[int, set[str]] = defaultdict(set)
        late = host.late_hooks().keys() - {""}
        for name, module in self.modules.items():
            computes = name in late or host.hook(module) is not None
            hidden = made_by_processing(module, host.blueprint) if computes else ()
            for t in (*tensors_of_module(module).values(), *hidden):
                self.owners[storage_key(t)].add(name)

    def tensor(self, target: Target) -> torch.Tensor | None:
        return tensors_of_module(self.modules[target[0]]).get(target[1])

    def place(self, target: Target) -> object:
        """Equal for tensors of one memory; one that processing took away is alone."""
        t = self.tensor(target)
        return target if t is None or not t.numel() else storage_key(t)


def _mirror(plan: LoadPlan, host: Host, live: _Live) -> None:
    """One tensor (or a tensor and its view) in checkpoint form, two in live memory: write both.

    Mamba's mixer holds a view of its convolution's weight; packing gives the weight new memory
    and leaves the view on the old, which the kernels go on reading. A tied head that was packed
    may have no weight any more.
    """
    users: dict[int, list[tuple[Target, TensorForm]]] = defaultdict(list)
    for name, m in live.modules.items():
        if (form := host.blueprint.form(m)) is not None:
            for t, f in form.tensors.items():
                users[f.key].append(((name, t), f))
    parts: list[Segment | Fill] = [s for rows in plan.segments.values() for s in rows]
    parts += [f for fills in plan.fills.values() for f in fills]
    for part in parts:
        whole = form_of(host, part.target)
        known = {live.place(part.target)}
        for target, f in users[whole.key]:
            place = live.place(target)
            if target == part.target or place in known:
                continue
            known.add(place)
            if f.numel < whole.numel:
                plan.opaque.setdefault(target[0], f"{target[1]} is a part of {part.target}")
                continue
            dest = replace(part.dest, offset=part.dest.offset + whole.offset - f.offset)
            if isinstance(part, Segment):
                moved = replace(part, target=target, dest=dest)
                plan.segments.setdefault(target[0], []).append(moved)
            else:
                plan.fills.setdefault(target[0], []).append(replace(part, target=target, dest=dest))


def _conflicts(plan: LoadPlan, host: Host, live: _Live) -> None:
    """Different tensors in checkpoint form may be one in live memory (retied embeddings)."""
    by_storage: dict[int, dict[Target, list[Segment]]] = defaultdict(lambda: defaultdict(list))
    for rows in plan.segments.values():
        for seg in rows:
            t = live.tensor(seg.target)
            if t is not None and t.numel() and form_of(host, seg.target).same_geometry(t):
                dest = replace(seg.dest, offset=seg.dest.offset + int(t.storage_offset()))
                by_storage[storage_key(t)][seg.target].append(replace(seg, dest=dest))
    for targets in by_storage.values():
        if len(targets) > 1:
            for a, b in overlaps([s for rows in targets.values() for s in rows]):
                if a.target != b.target:
                    plan.must_equal.append((a, b))


def _check_dtypes(plan: LoadPlan, host: Host) -> None:
    wrong = []
    for rows in plan.segments.values():
        for seg in rows:
            form = form_of(host, seg.target)
            want, have = str(form.dtype).removeprefix("torch."), plan.specs[seg.name].dtype
            if have != want and not {have, want} <= FLOATS:
                wrong.append(f"{seg.name}: {have} cannot become {want}")
    if wrong:
        raise PlanError(
            "dtypes that cannot be converted: " + "; ".join(sorted(set(wrong))[:20]),
            where=wrong[0].split(":")[0],
            next_step="send the tensors in the dtype of the served model",
        )


def _classify(plan: LoadPlan, host: Host, live: _Live) -> None:
    touched = set(plan.segments) | set(plan.fills) | set(plan.opaque)
    # Tied tensors: the module that holds the same live storage computes from it as well.
    shared = {
        other
        for name in touched
        for t in tensors_of_module(live.modules[name]).values()
        if t.numel()
        for other in live.owners[storage_key(t)]
    }
    with host.context():
        for name in sorted(touched | shared | _tied_in_form(host, live, touched)):
            if name not in plan.opaque and (why := _processed(name, plan, host, live)):
                plan.processed[name] = why
        for name, (module, hook) in host.late_hooks().items():
            if reads := set(trace(hook, module, live.owners)):
                plan.late[name] = reads
    plan.in_place = touched - set(plan.processed) - set(plan.opaque)


def _tied_in_form(host: Host, live: _Live, touched: set[str]) -> set[str]:
    """Modules tied to a touched one in checkpoint form, though processing gave them own memory."""
    keys = {
        f.key
        for n in touched
        if (form := host.blueprint.form(live.modules[n])) is not None
        for f in form.tensors.values()
    }
    return {
        n
        for n, m in live.modules.items()
        if (form := host.blueprint.form(m)) is not None
        and any(f.key in keys for f in form.tensors.values())
    }


def _processed(name: str, plan: LoadPlan, host: Host, live: _Live) -> str:
    """Why the live form of this module is not its checkpoint form; empty if it is."""
    module = live.modules[name]
    form = host.blueprint.form(module)
    if form is None:
        return ""
    targets = {s.target[1] for s in plan.segments.get(name, [])}
    targets |= {f.target[1] for f in plan.fills.get(name, [])}
    hook = host.hook(module)
    for t in sorted(targets):
        now = live.tensor((name, t))
        if form.tensors[t].same_geometry(now):
            continue
        if hook is None and now is not None:
            raise PlanError(
                f"{tuple(form.tensors[t].size)} became {tuple(now.shape)} after loading, "
                "in a way that cannot be repeated",
                where=f"{name}.{t}",
                next_step="serve with the backend upstream_ipc",
            )
        return f"{t} has another form after loading"
    if hook is None:
        return ""
    if any(live.tensor((name, t)) is None for t in form.tensors):
        return "loading removes tensors"
    found = probe(name, module, host.blueprint, hook, live.owners)
    return f"processing: {found[name]}" if name in found else ""
