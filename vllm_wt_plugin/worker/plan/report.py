"""What a plan says to the trainer: names, and what becomes of them on this rank."""

from __future__ import annotations

import re
from collections import defaultdict

from vllm_wt_plugin.wire.messages import PlanReport
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.segment import Region

NOT_WEIGHTS = re.compile(
    r"\.(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|attn\.(masked_)?bias)$"
)


def describe(plan: LoadPlan, host: Host) -> PlanReport:
    """The report of a finished plan."""
    taken: dict[str, int] = defaultdict(int)
    for name, source in {(s.name, s.source) for rows in plan.segments.values() for s in rows}:
        taken[name] += _distinct(source)
    ignored: dict[str, str] = {}
    nowhere: list[str] = []
    for name in plan.specs:
        if taken[name] or name in plan.opaque_names or not plan.specs[name].numel:
            continue
        why = _ignorable(name, host)
        if why:
            ignored[name] = why
        else:
            nowhere.append(name)
    # What a fresh engine would skip of the same file is no mistake: heads of models that tie them
    # whatever their config says, layers of drafts, towers that are not served.
    own = host.checkpoint_names() if nowhere else frozenset()
    ignored |= dict.fromkeys(own.intersection(nowhere), "skipped in the engine's own checkpoint")
    nowhere = [n for n in nowhere if n not in own]
    return PlanReport(
        tensors=len(plan.specs),
        bytes=sum(s.nbytes for s in plan.specs.values()),
        elements=sum(s.numel for s in plan.specs.values()),
        segments=sum(len(r) for r in plan.segments.values()),
        in_place=len(plan.in_place),
        processed=dict(plan.processed),
        opaque=dict(plan.opaque),
        ignored=ignored,
        nowhere=nowhere,
        derived=_derived(plan, host),
        kept=plan.kept,
        consumed={
            n: taken[n]
            for n, s in plan.specs.items()
            if 0 < taken[n] < s.numel and n not in plan.opaque_names
        },
    )


def _distinct(source: Region) -> int:
    """Source elements that are read (a broadcast dimension reads one)."""
    n = 1
    for size, stride in zip(source.size, source.stride, strict=True):
        n *= size if stride else 1
    return n


def head_again(name: str, host: Host) -> bool:
    """A tied head that is named once more: some loaders skip it, others raise."""
    return host.tied_head and (name.endswith("lm_head.weight") or name == "proj_out.weight")


def _ignorable(name: str, host: Host) -> str:
    if NOT_WEIGHTS.search(name):
        return "not a weight"
    if head_again(name, host):
        return "tied to the input embeddings"
    layer = re.search(r"\blayers\.(\d+)\.", name)
    n = host.num_hidden_layers
    if layer and n is not None and int(layer.group(1)) >= n:
        return "a layer of a draft (MTP) model"
    return ""


def _derived(plan: LoadPlan, host: Host) -> list[str]:
    """Live tensors that no checkpoint form has: made by processing."""
    return [
        f"{name}.{t}"
        for name, m in plan.modules.items()
        if (form := host.blueprint.form(m)) is not None
        for t in m._parameters
        if t not in form.tensors and m._parameters[t] is not None
    ]
