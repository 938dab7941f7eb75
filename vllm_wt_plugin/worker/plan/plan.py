"""The load plan of one model for one list of checkpoint tensors.

    in place    the live tensor is the checkpoint-form tensor: an update is a copy
    processed   the live form is computed: copy into checkpoint form, compute it again
    opaque      loading cannot be expressed as copies: the module goes through vLLM's loader

`build.py` makes it, `update.py` follows it. Integers and names only, no tensor is kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property

from torch import nn

from vllm_wt_plugin.wire.messages import PlanReport
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.segment import Fill, Segment


@dataclass
class LoadPlan:
    """Where every checkpoint tensor of `specs` goes, module by module (qualified names)."""

    specs: dict[str, ParamSpec]
    segments: dict[str, list[Segment]] = field(default_factory=dict)  # by module
    fills: dict[str, list[Fill]] = field(default_factory=dict)
    in_place: set[str] = field(default_factory=set)
    processed: dict[str, str] = field(default_factory=dict)
    opaque: dict[str, str] = field(default_factory=dict)
    opaque_names: set[str] = field(default_factory=set)  # what the loader needs for `opaque`
    late: dict[str, set[str]] = field(default_factory=dict)  # late hook → modules it reads
    must_equal: list[tuple[Segment, Segment]] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # buffers that stay as they are
    report: PlanReport = field(default_factory=PlanReport)
    modules: dict[str, nn.Module] = field(default_factory=dict)  # of the model, by name

    @cached_property
    def empty(self) -> frozenset[str]:
        """Names without elements: they have arrived before they are sent."""
        return frozenset(n for n, s in self.specs.items() if not s.numel)

    @property
    def computed_names(self) -> set[str]:
        """Names that take more than a copy into live memory."""
        return self.opaque_names | {
            s.name for m in self.processed for s in self.segments.get(m, [])
        }

    @cached_property
    def by_name(self) -> dict[str, list[tuple[str, Segment]]]:
        """Each checkpoint name's segments, with their modules."""
        out: dict[str, list[tuple[str, Segment]]] = defaultdict(list)
        for module, rows in self.segments.items():
            for seg in rows:
                out[seg.name].append((module, seg))
        return dict(out)

    @property
    def followers(self) -> set[str]:
        """Processed modules without a segment: computed from a tensor tied to theirs."""
        return {m for m in self.processed if not self.segments.get(m)}

    def only(self, names: Collection[str]) -> LoadPlan:
        """The part of the plan that these names touch. To replay it, `names` is all of a group
        of `report.whole`, or tensors that are plain copies."""
        segments: dict[str, list[Segment]] = defaultdict(list)
        for name in names:
            for module, seg in self.by_name.get(name, ()):
                segments[module].append(seg)
        loader = not self.opaque_names.isdisjoint(names)
        follow = self.followers if names else set()
        return LoadPlan(
            {n: self.specs[n] for n in names if n in self.specs},
            segments=dict(segments),
            fills={m: f for m, f in self.fills.items() if m in segments},
            in_place=self.in_place & segments.keys(),
            processed={m: why for m, why in self.processed.items() if m in segments or m in follow},
            opaque=self.opaque if loader else {},
            opaque_names=self.opaque_names if loader else set(),
            late=self.late,
            must_equal=[(a, b) for a, b in self.must_equal if a.name in names and b.name in names],
            modules=self.modules,
        )
