"""Does a list of names fill every parameter of the model, wholly?"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from vllm_wt_plugin.errors import PlanError
from vllm_wt_plugin.worker.plan.host import Host, form_of
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.record import Recording, Written
from vllm_wt_plugin.worker.plan.segment import Region, covered
from vllm_wt_plugin.worker.plan.verify import rehearse


def check_coverage(plan: LoadPlan, host: Host, rec: Recording, complete: bool) -> None:
    """Parameters that this list fills only in part: an error, or the loader's business.

    Makes `plan.opaque` and what follows from it final. Raises PlanError if `complete`.
    """
    written = list(rec.written)
    short = _short(plan, host, written)
    if rec.dropped:
        names = plan.opaque_names | {s.name for m in short for s in plan.segments.get(m, [])}
        specs = [s for s in plan.specs.values() if s.name in names]
        rehearsed = rehearse(host, plan.opaque.keys() | short.keys(), specs)
        why = "its loader cannot be recorded: " + next(iter(rec.dropped.values()))
        plan.opaque |= {m: why for (m, _), _ in rehearsed if m in short}
        written += rehearsed
        short = _short(plan, host, written)
    if complete:
        plan.kept = _kept(plan, host, written)
    if short and complete:
        raise _uncovered([r for rs in short.values() for r in rs], plan)
    _spread(plan, host)
    for name in plan.opaque:
        plan.processed.pop(name, None)
        plan.in_place.discard(name)
        plan.opaque_names |= {s.name for s in plan.segments.get(name, [])}


def _uncovered(rows: list[str], plan: LoadPlan) -> PlanError:
    what = f"{len(rows)} live parameters that no name covers: {', '.join(rows[:20])}"
    next_step = "send every parameter of the model in one update"
    known = plan.by_name.keys() | plan.opaque_names | plan.empty
    if lost := [n for n in plan.specs if n not in known]:  # likely the same under other names
        what += f"; names that end nowhere here: {', '.join(lost[:20])}"
        next_step += ", by the names of its checkpoint (of a transformers model: push the module)"
    return PlanError(what, where=rows[0].split(" ")[0], next_step=next_step)


def _short(plan: LoadPlan, host: Host, written: list[Written]) -> dict[str, list[str]]:
    """Modules with parameters that are not, or not wholly, filled: {module: what, in words}."""
    filled = _filled(plan, host, written)
    short: dict[str, list[str]] = {}
    for name, module in host.model.named_modules():
        form = host.blueprint.form(module)
        for tensor, tform in () if form is None else form.params.items():
            if module._parameters.get(tensor) is None and tform.numel == 1:
                continue  # processing removed it: a scale that few checkpoints have
            need, have = host.loadable(tform.empty("meta")), filled.get(tform.key, 0)
            if have < need:
                part = f"{have} of {need} elements" if have else "nothing"
                short.setdefault(name, []).append(f"{name}.{tensor} ({part})")
    return short


def _kept(plan: LoadPlan, host: Host, written: list[Written]) -> list[str]:
    """Buffers that no name fills, though the engine's own checkpoint does: it has a name that ends
    like theirs and is not sent (`named_parameters()` leaves out what is trained by other means)."""
    buffers = [
        (name, tensor, tform.key)
        for name, module in host.model.named_modules()
        if (form := host.blueprint.form(module)) is not None
        for tensor, tform in form.buffers.items()
        if tensor not in form.non_persistent and tform.numel
    ]
    filled = _filled(plan, host, written) if buffers else {}  # most models have none
    rows = [(name, tensor) for name, tensor, key in buffers if not filled.get(key)]
    own = host.checkpoint_names() if rows else frozenset()
    unsent = {n.rpartition(".")[2] for n in own - plan.specs.keys()}
    return [f"{name}.{tensor}" for name, tensor in rows if tensor in unsent]


def _filled(plan: LoadPlan, host: Host, written: list[Written]) -> dict[int, int]:
    """Elements written of each tensor in checkpoint form, by its key."""
    parts: dict[int, list[Region]] = defaultdict(list)
    rows = [(s.target, s.dest) for segments in plan.segments.values() for s in segments]
    rows += [(f.target, f.dest) for fills in plan.fills.values() for f in fills]
    for target, dest in rows + written:
        form = form_of(host, target)
        parts[form.key].append(replace(dest, offset=form.offset + dest.offset))
    return {key: covered(regions) for key, regions in parts.items()}


def _spread(plan: LoadPlan, host: Host) -> None:
    """Whatever shares memory with an opaque module in checkpoint form is the loader's, too."""
    keys: dict[str, set[int]] = {}
    users: dict[int, set[str]] = defaultdict(set)
    for name, module in host.model.named_modules():
        if (form := host.blueprint.form(module)) is not None:
            keys[name] = {f.key for f in form.tensors.values()}
            for key in keys[name]:
                users[key].add(name)
    todo = list(plan.opaque)
    while todo:
        name = todo.pop()
        for other in set().union(*(users[key] for key in keys.get(name, ()))) - plan.opaque.keys():
            plan.opaque[other] = f"tied to {name}"
            todo.append(other)
