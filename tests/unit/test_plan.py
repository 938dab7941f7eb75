"""The load plan on toy models: what is recorded, how modules are classified, what an update makes.

No vLLM (test_package.py sees to it), no GPU. `toys.fresh(kind, seed)` is the judge: an update must
end in a model that equals a newly loaded one, bit for bit.
"""

from __future__ import annotations

import functools
import gc
import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.unit import toys
from tests.unit.toys import SHARDED, TOYS, Linear, Toy, ToyHost, fresh, same_bits, specs_of
from vllm_wt_plugin.errors import PlanError, RequestError
from vllm_wt_plugin.wire.buckets import Piece, cut
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan import process, segment
from vllm_wt_plugin.worker.plan import update as update_module
from vllm_wt_plugin.worker.plan.blueprint import processor_of
from vllm_wt_plugin.worker.plan.build import build
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.record import Recording, record
from vllm_wt_plugin.worker.plan.segment import Region, Segment, covered, narrow, overlaps
from vllm_wt_plugin.worker.plan.update import Replay, Update, check_equal
from vllm_wt_plugin.worker.plan.verify import disagreements

Tensors = dict[str, torch.Tensor]
RANKS = [
    (kind, rank, world)
    for kind in TOYS
    for rank, world in ([(0, 1), (0, 2), (1, 2), (3, 4)] if kind in SHARDED else [(0, 1)])
]


def recorded(host: ToyHost, names: Iterable[str] | None = None) -> Recording:
    tensors = toys.checkpoint(host.toy, 1)
    chosen = tensors if names is None else {n: tensors[n] for n in names}
    return record(host.model, host.blueprint, host.load, specs_of(chosen))


def planned(host: ToyHost, *, without: Iterable[str] = (), complete: bool = True) -> LoadPlan:
    tensors = toys.checkpoint(host.toy, 1)
    left = {n: t for n, t in tensors.items() if n not in set(without)}
    return build(host, specs_of(left), complete=complete)


def spec(name: str, *shape: int, dtype: str = "float32") -> ParamSpec:
    return ParamSpec(name, dtype, shape)


# ---- regions: integers against plain indexing ---------------------------------------------


@st.composite
def views(draw: st.DrawFn, max_dims: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous tensor of distinct numbers, and a view of it that a loader might take."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=max_dims))
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    view = whole
    for _ in range(draw(st.integers(0, 4)) if shape else 0):
        if not view.dim():
            break
        dim = draw(st.integers(0, view.dim() - 1))
        n = view.shape[dim]
        match draw(st.sampled_from(["narrow", "step", "permute", "merge", "split", "add", "take"])):
            case "narrow":
                start = draw(st.integers(0, max(n - 1, 0)))
                view = view.narrow(dim, start, draw(st.integers(0, n - start)))
            case "step":
                at: tuple[Any, ...] = (slice(None),) * dim
                view = view[(*at, slice(draw(st.integers(0, n)), None, draw(st.integers(1, 3))))]
            case "permute":
                view = view.permute(draw(st.permutations(range(view.dim()))))
            case "merge" if view.is_contiguous():
                view = view.view(-1)
            case "split" if n and n % 2 == 0:
                view = view.unflatten(dim, (2, n // 2))
            case "add":
                view = view.unsqueeze(dim).expand(*view.shape[:dim], 2, *view.shape[dim:])
            case "take" if n:
                view = view.select(dim, draw(st.integers(0, n - 1)))
    return whole, view


@st.composite
def memories(draw: st.DrawFn, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of `shape` laid out in some other way: permuted, with gaps, with an offset."""
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.integers(0, 2)) for _ in shape]
    padded = [shape[d] + gaps[d] for d in order]
    base = torch.full([2, *padded], -1)[1]
    out = base[tuple(slice(0, shape[d]) for d in order)]
    return out.permute(*(order.index(d) for d in range(len(shape)))) if shape else out


@settings(max_examples=300, deadline=None)
@given(views(), st.data())
def test_source_view_finds_the_same_elements_however_the_tensor_lies(
    case: tuple[torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    whole, view = case
    lying = data.draw(memories(tuple(whole.shape)))
    lying.copy_(whole)
    assert torch.equal(segment.source_view(lying, Region.of(view)), view)


@settings(max_examples=300, deadline=None)
@given(views(), st.data())
def test_restride_is_right_or_gives_up(
    case: tuple[torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    whole, view = case
    lying = data.draw(memories(tuple(whole.shape)))
    lying.copy_(whole)
    moved = segment._restride(Region.of(view), tuple(whole.shape), lying.stride())
    if moved is not None:
        assert torch.equal(moved.of_tensor(lying), view)


def test_restride_views_in_place_what_a_loader_takes() -> None:
    """Giving up always would be right, too, and copy every strided tensor."""
    t = torch.arange(24).reshape(6, 4).t().contiguous().t()  # column-major
    assert not t.is_contiguous()
    for view in (torch.arange(24).reshape(6, 4)[2:5], torch.arange(24).reshape(6, 4)[:, 1:3].t()):
        got = segment.source_view(t, Region.of(view))
        assert torch.equal(got, view)
        assert got.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()


@settings(max_examples=300, deadline=None)
@given(views(), st.integers(1, 3))
def test_narrow_gives_each_row_once(case: tuple[torch.Tensor, torch.Tensor], rows: int) -> None:
    """A tensor that comes row by row, each time in a buffer of only those rows."""
    whole, view = case
    dest = torch.full((max(view.numel(), 1),), -1)
    place = Region(0, tuple(view.shape), torch.empty(view.shape).stride())
    seg = Segment("n", Region.of(view), ("m", "t"), place)
    shape = tuple(whole.shape)
    total = shape[0] if shape else 1
    for row in range(0, total, rows):
        n = min(rows, total - row)
        buffer = (whole[row : row + n] if shape else whole).clone()
        for part in narrow(seg, shape, row, n):
            part.dest.of_tensor(dest).copy_(segment.source_view(buffer, part.source))
    assert torch.equal(place.of_tensor(dest), view)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3).flatmap(lambda _: views(max_dims=2)), min_size=1, max_size=5))
def test_overlaps_and_covered_against_sets(cases: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Regions of one 5 × 5 tensor; an expanded one counts each element once."""
    regions = [Region.of(view) for _, view in cases]
    elements = [set(view.flatten().tolist()) for _, view in cases]
    segments = [Segment(str(i), r, ("m", "t"), r) for i, r in enumerate(regions) if elements[i]]
    got = {frozenset((a.name, b.name)) for a, b in overlaps(segments)}
    want = {
        frozenset((str(i), str(j)))
        for i, j in itertools.combinations(range(len(cases)), 2)
        if elements[i] & elements[j]
    }
    assert got == want
    assume(all(0 not in r.stride or r.numel <= 1 for r in regions))
    assert covered(regions) == len(set().union(*elements))


def test_regions_with_nothing_in_them() -> None:
    empty = Region.of(torch.empty(0, 3))
    assert empty.numel == 0
    assert empty.last == empty.offset - 1
    assert covered([empty]) == 0
    assert list(overlaps([Segment("a", empty, ("m", "t"), empty)] * 2)) == []


# ---- recording ----------------------------------------------------------------------------


def regions(host: ToyHost, name: str) -> list[tuple[str, Region, Region]]:
    return [
        (".".join(s.target), s.source, s.dest) for s in recorded(host).segments if s.name == name
    ]


def box(start: int, *shape: int, of: int | None = None) -> Region:
    """Rows of a matrix with `of` columns (its own, if not given), from element `start`."""
    stride = (of if of is not None else shape[-1], 1) if len(shape) == 2 else (1,)
    return Region(start, shape, stride)


def test_fused_shards() -> None:
    """q, k, v of rank 1 of 2; k and v of a single head are replicated over four ranks."""
    host = fresh("Fused", 1, 1, 2)
    qkv = "layers.0.qkv.weight"
    assert regions(host, "layers.0.q_proj.weight") == [(qkv, box(72, 6, 12), box(0, 6, 12))]
    assert regions(host, "layers.0.k_proj.weight") == [(qkv, box(36, 3, 12), box(72, 3, 12))]
    assert regions(host, "layers.0.v_proj.bias") == [("layers.0.qkv.bias", box(3, 3), box(9, 3))]
    up = [("layers.1.gate_up.weight", box(48, 4, 12), box(48, 4, 12))]
    assert regions(host, "layers.1.up.weight") == up
    # Row-parallel: columns of the source, the whole of the destination.
    down = [("layers.0.down.weight", box(4, 12, 4, of=8), box(0, 12, 4))]
    assert regions(host, "layers.0.down.weight") == down
    replicated = fresh("Fused", 1, 3, 4)
    assert regions(replicated, "layers.0.k_proj.bias") == [
        ("layers.0.qkv.bias", box(3, 3), box(3, 3))
    ]


def test_vocabulary_padding_is_a_fill() -> None:
    rec = recorded(fresh("Embeddings", 1, 1, 2))
    fills = {(f.target, f.dest, f.value) for f in rec.fills}
    # Rank 1 holds rows 8 and 9 of 10, and six rows of padding.
    assert fills == {
        ((m, "weight"), Region(24, (6, 12), (12, 1)), 0.0) for m in ("embed", "lm_head")
    }
    assert {s.source for s in rec.segments} == {box(96, 2, 12)}


def test_a_rank_of_padding_only_takes_nothing() -> None:
    host = fresh("Embeddings", 1, 3, 4)
    assert all(s.source.numel == 0 for s in recorded(host).segments)
    assert planned(host).report.nowhere == ["embed.weight", "lm_head.weight"]


def test_experts_by_name() -> None:
    host = fresh("MoE", 1, 1, 2)
    at = 2 * (2 * 4 * 12)  # expert 2's gate and up
    assert regions(host, "experts.2.w3.weight") == [
        ("experts.w13_weight", box(48, 4, 12), box(at + 48, 4, 12))
    ]
    assert regions(host, "experts.1.w2.weight") == [
        ("experts.w2_weight", box(4, 12, 4, of=8), box(48, 12, 4))
    ]


def test_transposed_and_split_sources() -> None:
    host = fresh("Conv1D", 1)
    assert regions(host, "fc.weight") == [("fc.weight", Region(0, (8, 12), (1, 8)), box(0, 8, 12))]
    assert [r[0] for r in regions(host, "fused.weight")] == ["parts.0", "parts.1", "parts.2"]
    assert [r[1].offset for r in regions(host, "fused.weight")] == [0, 48, 72]


def test_destinations_that_are_strided() -> None:
    host = fresh("Columns", 1)
    assert regions(host, "odd") == [("fc.weight", box(0, 8, 6), Region(1, (8, 6), (12, 2)))]
    turned = [("turned.weight", box(0, 8, 12), Region(0, (8, 12), (1, 8)))]
    assert regions(host, "turned.weight") == turned


def test_a_tied_parameter_is_one_destination() -> None:
    assert len(regions(fresh("TiedParameter", 1), "embed.weight")) == 1


@pytest.mark.parametrize(
    ("kind", "target", "why"),
    [
        ("Mamba", ("mixer", "A"), "read by aten.exp"),
        ("Cat", ("fused", "weight"), "written by aten.copy_"),
        ("Permuted", ("mlp", "w13"), "written by aten.copy_"),
        ("Permuted", ("mlp", "bias"), "the loader replaces this tensor"),
        ("Assigned", ("viewed", "weight"), "the loader replaces this tensor"),
        ("Assigned", ("computed", "weight"), "the loader replaces this tensor"),
        ("Assigned", ("replaced", "weight"), "the loader replaces this tensor"),
        ("Restrided", ("fc", "weight"), "the loader replaces this tensor"),
        ("Written", ("indexed", "weight"), "written by aten.index_put_"),
        ("Written", ("added", "weight"), "written by aten.add_"),
        ("Bytes", ("same", "weight"), "read by aten.view.dtype"),
        ("Bytes", ("packed", "weight"), "written by aten.copy_"),
        ("Attributes", ("note", "scale"), "the loader sets this attribute"),
        ("Attributes", ("note", "table"), "the loader sets this attribute"),
    ],
)
def test_what_makes_recording_lie(kind: str, target: tuple[str, str], why: str) -> None:
    assert why in recorded(fresh(kind, 1)).opaque_targets[target]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("Cat", {"a.weight", "b.weight", "c.weight"}),
        ("Permuted", {"mlp.gate_up", "mlp.bias"}),
        ("Assigned", {"viewed.weight", "computed.weight", "replaced.weight"}),
        ("Written", {"indexed.weight", "added.weight"}),
        ("Attributes", {"note.scale", "note.table"}),
        ("Bytes", {"same.weight", "bytes.weight", "packed.weight"}),
        ("Fused", set()),
        ("Columns", set()),
        ("Mamba", set()),  # A is copied as it is first; what follows reads the parameter
    ],
)
def test_names_that_only_the_loader_can_place(kind: str, names: set[str]) -> None:
    assert recorded(fresh(kind, 1)).opaque_names.keys() == names


def test_a_loader_that_raises_loses_its_group_only() -> None:
    rec = recorded(fresh("ReadsValues", 1))
    assert list(rec.dropped) == ["scaled.weight"]
    assert "item() cannot be called on meta tensors" in rec.dropped["scaled.weight"]
    assert [s.name for s in rec.segments] == ["plain.weight"]


def test_the_same_module_of_every_layer_is_one_group() -> None:
    class Layers(Toy):
        def make(self) -> None:
            self.layers = nn.ModuleList(toys.ReadsValues() for _ in range(3))

        def load_weights(self, weights: toys.Weights) -> None:
            for name, w in weights:
                i, rest = name.removeprefix("layers.").split(".", 1)
                self.layers[int(i)].load_weights([(rest, w)])

    loads = 0

    class Host(ToyHost):
        def load(self, weights: toys.Weights) -> object:
            nonlocal loads
            loads += 1
            return super().load(weights)

    rec = recorded(Host(Layers()))
    assert set(rec.dropped) == {f"layers.{i}.scaled.weight" for i in range(3)}
    assert len(rec.segments) == 3
    assert loads == 2


def test_a_loader_that_raises_for_nothing_is_not_swallowed() -> None:
    host = fresh("Fused", 1)
    host.fail_load = ValueError("no checkpoint can please me")
    with pytest.raises(ValueError, match="please me"):
        recorded(host)


class WritesLive(Toy):
    """A loader with a real tensor beside the model's registries."""

    def make(self) -> None:
        self.fc = Linear(8, 12)
        self.plain = Linear(8, 12)
        self.box = [torch.ones(3)]

    def load_weights(self, weights: toys.Weights) -> None:
        for name, w in weights:
            if name == "fc.weight":
                self.box[0].fill_(7)
            getattr(self, name.split(".")[0]).weight.data.copy_(w)


def test_a_write_to_real_memory_is_stopped_before_it_happens() -> None:
    host = fresh(WritesLive, 1)
    host.toy.box[0].fill_(1)
    rec = recorded(host)
    assert torch.equal(host.toy.box[0], torch.ones(3))
    assert "would write a live tensor of shape (3,)" in rec.dropped["fc.weight"]


class OwnScratch(Toy):
    """A loader may write real memory that it makes itself."""

    def make(self) -> None:
        self.fc = Linear(8, 12)

    def load_weights(self, weights: toys.Weights) -> None:
        for _, w in weights:
            order = torch.zeros(8, dtype=torch.long)
            order.copy_(torch.arange(8))
            order.mul_(1)
            self.fc.weight.data.copy_(w)


def test_a_loaders_own_scratch_memory_is_its_own() -> None:
    rec = recorded(fresh(OwnScratch, 1))
    assert not rec.dropped
    assert len(rec.segments) == 1


# ---- nothing is left behind ---------------------------------------------------------------


def snapshot(model: nn.Module) -> list[Any]:
    """Every object a module, its registries and its processor name, and every tensor's bits."""
    out: list[Any] = []
    for module in model.modules():
        tables = [module.__dict__, module._parameters, module._buffers, module._modules]
        if (processor := processor_of(module)) is not None:
            tables.append(vars(processor))
        out += [(table, dict(table)) for table in tables]
        out.append((module._non_persistent_buffers_set, set(module._non_persistent_buffers_set)))
    tensors = toys.live_tensors(model)
    out += [
        (t, (t.data_ptr(), tuple(t.shape), t.stride(), t.clone()), dict(p.__dict__))
        for p, t in ((p, p.detach()) for p in model.parameters())
    ]
    return [*out, {n: t.clone() for n, t in tensors.items()}]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    *rows, tensors = before
    for row in rows:
        if len(row) == 3:
            t, (address, shape, stride, bits), _ = row
            assert (t.data_ptr(), tuple(t.shape), t.stride()) == (address, shape, stride)
            assert same_bits(t, bits)
        elif isinstance(row[0], dict):
            assert list(row[0]) == list(row[1])
            assert all(row[0][k] is v for k, v in row[1].items())
        else:
            assert row[0] == row[1]
    now = toys.live_tensors(model)
    assert now.keys() == tensors.keys()
    assert all(same_bits(now[n], t) for n, t in tensors.items())


@pytest.mark.parametrize("kind", [k for k in TOYS if k != "Everything"])
def test_planning_changes_nothing(kind: str) -> None:
    host = fresh(kind, 1)
    before = snapshot(host.model)
    planned(host)
    assert_unchanged(host.model, before)
    assert host.inside == 0


class Breaks(Toy):
    """Raises half-way, after it has replaced and set things everywhere."""

    when = "record"

    def make(self) -> None:
        self.fc = Linear(8, 12, method=toys.Stateful())
        self.plain = Linear(8, 12)

    def load_weights(self, weights: toys.Weights) -> None:
        weights = list(weights)
        for name, w in weights:
            copy = getattr(self, name.split(".")[0]).weight
            copy.data.copy_(w)
        meta = all(w.is_meta for _, w in weights)
        if (self.when == "record") == meta and self.when != "never":
            self.fc.weight = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.fc.extra = nn.Parameter(torch.zeros(1), requires_grad=False)
            self.fc.quant_method.moe_kernel = "broken"
            self.plain.note = object()
            del self.plain.weight
            raise RuntimeError("half-way")


def broken(when: str) -> ToyHost:
    class Now(Breaks):
        pass

    Now.when = "never"
    host = fresh(Now, 1)
    Now.when = when
    return host


def test_a_loader_that_breaks_while_recorded_leaves_the_model_as_it_was() -> None:
    host = broken("record")
    before = snapshot(host.model)
    with pytest.raises(RuntimeError, match="half-way"):  # even without any name
        planned(host)
    assert_unchanged(host.model, before)


def test_a_loader_that_breaks_on_real_tensors_leaves_the_model_as_it_was() -> None:
    host = broken("real")
    before = snapshot(host.model)
    plan = planned(host)
    assert_unchanged(host.model, before)
    assert "half-way" in plan.opaque["fc"]
    update = Update(host, plan)
    update.receive(toys.checkpoint(host.toy, 2), lasting=True)
    with pytest.raises(RuntimeError, match="half-way"):
        update.finish()
    assert_unchanged(host.model, before)


class HookBreaks(Toy):
    """Processing raises when it runs on new weights."""

    def make(self) -> None:
        self.fc = Linear(8, 12, method=toys.PackEmpty())


def test_a_hook_that_breaks_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    host = fresh(HookBreaks, 1)
    plan = planned(host)
    before = snapshot(host.model)

    def breaks(self: Any, layer: nn.Module) -> None:
        layer.weight = nn.Parameter(torch.zeros(2), requires_grad=False)
        layer.cpu_linear = None
        raise RuntimeError("no memory")

    monkeypatch.setattr(toys.PackEmpty, "process_weights_after_loading", breaks)
    with pytest.raises(RuntimeError, match="no memory"):
        Update(host, plan).receive(toys.checkpoint(host.toy, 2), lasting=True)
    assert_unchanged(host.model, before)


# ---- classification -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "processed", "opaque"),
    [
        ("Fused", {}, {}),
        ("Embeddings", {}, {}),
        ("Buffers", {}, {}),
        ("Carved", {}, {}),
        ("Columns", {}, {}),
        ("processed_plain", {}, {}),
        ("processed_pack_keep", {"fc": "clone"}, {}),
        ("processed_pack_empty", {"fc": "another form"}, {}),
        ("processed_pack_drop", {"fc": "another form"}, {}),
        ("processed_quantise", {"fc": "another form"}, {}),
        ("processed_transpose", {"fc": "another form"}, {}),
        ("processed_transpose_view", {"fc": "another form"}, {}),
        ("processed_in_place_hook", {"fc": "mul_"}, {}),
        ("processed_stateful", {"fc": "another form"}, {}),
        ("processed_handle", {"fc": "another form"}, {}),
        ("processed_hidden_handle", {"fc": "tensors or handles of its own"}, {}),
        ("TiedParameter", {}, {}),
        ("TiedPacked", {"lm_head": "clone"}, {}),
        ("TiedDropped", {"embed": "another form", "lm_head": "another form"}, {}),
        ("TiedHeadDropped", {"lm_head": "another form"}, {}),
        ("TiedOpaque", {}, {"embed": "weight: written by", "lm_head": "weight: written by"}),
        ("TiedLies", {}, {"embed": "coded values", "lm_head": "tied to embed"}),
        ("Mamba", {}, {"mixer": "A: read by", "mixer.conv1d": "tied to mixer"}),
        ("Lies", {}, {"layers.0": "coded values", "layers.1": "coded values"}),
        ("Written", {}, {"indexed": "index_put_", "added": "add_", "refilled": "coded values"}),
        ("ReadsValues", {}, {"scaled": "cannot be recorded: RuntimeError: Tensor.item()"}),
        ("Attributes", {}, {"note": "scale: the loader sets this attribute"}),
        ("Elsewhere", {"fc": "clone"}, {}),
    ],
)
def test_classified_by_behaviour(kind: str, processed: dict[str, str], opaque: dict[str, str]):
    plan = planned(fresh(kind, 1))
    for want, got in ((processed, plan.processed), (opaque, plan.opaque)):
        assert got.keys() == want.keys()
        assert {m: why for m, why in want.items() if why not in got[m]} == {}
    assert plan.in_place.isdisjoint({*processed, *opaque})
    assert plan.report.processed == plan.processed
    assert plan.report.opaque == plan.opaque
    assert plan.report.in_place == len(plan.in_place)


@pytest.mark.parametrize("kind", ["MLA", "MLAPacked", "LateTwice"])
def test_late_hooks_know_what_they_read(kind: str) -> None:
    """MLA reads another module, through its quant method: where that packs, through a closure."""
    plan = planned(fresh(kind, 1))
    assert plan.late["attn"] == {"attn", "kv_b_proj"}
    assert "kv_b_proj" in (plan.processed if kind == "MLAPacked" else plan.in_place)
    if kind == "LateTwice":
        assert plan.late["middle"] == {"attn"}
        assert plan.late["last"] == {"middle"}


def test_planning_does_not_repeat_a_late_hook_that_writes_its_own_weight() -> None:
    host = fresh("LateTwice", 1)
    sinks = host.toy.attn.sinks.clone()
    planned(host)
    assert torch.equal(host.toy.attn.sinks, sinks)


def test_a_form_that_nothing_explains_is_refused() -> None:
    with pytest.raises(PlanError, match="cannot be repeated") as caught:
        planned(fresh(toys.LateOwn, 1))
    assert caught.value.where == "attn.weight"


def test_derived_tensors_are_named() -> None:
    assert planned(fresh("processed_quantise", 1)).report.derived == ["fc.weight_scale"]


def test_a_lying_loader_is_found_out_in_every_layer() -> None:
    host = fresh("Lies", 1)
    specs = {s.name: s for s in specs_of(toys.checkpoint(host.toy, 1))}
    found = disagreements(host, specs, recorded(host))
    assert found.keys() == {"layers.0", "layers.1"}


def test_equal_layers_are_run_once() -> None:
    """The check costs one layer, not all of them."""
    seen: list[str] = []

    class Many(Toy):
        num_hidden_layers = 6

        def make(self) -> None:
            self.layers = nn.ModuleList(Linear(8, 12) for _ in range(6))

        def load_weights(self, weights: toys.Weights) -> None:
            for name, w in weights:
                if not w.is_meta:
                    seen.append(name)
                self.get_parameter(name).data.copy_(w)

    host = fresh(Many, 1)
    seen.clear()
    planned(host)
    assert seen == ["layers.0.weight"]


# ---- what is refused before bytes move ----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "missing", "says"),
    [
        ("Fused", "layers.1.norm.weight", "layers.1.norm.weight (nothing)"),
        ("Fused", "layers.0.k_proj.weight", "layers.0.qkv.weight (216 of 288 elements)"),
        ("Fused", "layers.0.up.weight", "layers.0.gate_up.weight (96 of 192 elements)"),
        ("Embeddings", "lm_head.weight", "lm_head.weight (nothing)"),
        ("MoE", "experts.1.w2.weight", "experts.w2_weight (192 of 288 elements)"),
        ("Columns", "odd", "fc.weight (48 of 96 elements)"),
        ("Carved", "fc.bias", "fc.bias (nothing)"),
        ("ZeroedFirst", "fc.weight", "fc.weight (nothing)"),
        ("Mamba", "mixer.D", "mixer.D (nothing)"),
        ("ReadsValues", "plain.weight", "plain.weight (nothing)"),
        ("ReadsValues", "scaled.weight", "scaled.weight (nothing)"),
        ("Assigned", "viewed.weight", "viewed.weight (nothing)"),
        ("processed_pack_drop", "fc.weight", "fc.weight (nothing)"),
        ("Attributes", "fc.weight", "fc.weight (nothing)"),
        ("TiedDropped", "embed.weight", "embed.weight (nothing)"),
    ],
)
def test_a_missing_name_is_an_error_that_names_the_parameter(
    kind: str, missing: str, says: str
) -> None:
    host = fresh(kind, 1)
    if len(host.toy.shapes()) == 1:
        with pytest.raises(PlanError, match="no name covers"):
            build(host, [])
        return
    with pytest.raises(PlanError, match="no name covers") as caught:
        planned(host, without=[missing])
    assert says in str(caught.value)
    assert "(" not in caught.value.where


def test_what_is_written_twice_counts_once() -> None:
    class Half(Toy):
        def make(self) -> None:
            self.fc = Linear(8, 12)

        def shapes(self) -> toys.Shapes:
            return {"half": (4, 12)}

        def load_weights(self, weights: toys.Weights) -> None:
            for _, w in weights:
                self.fc.weight.data[:4].zero_()
                self.fc.weight.data[:4].copy_(w)

    with pytest.raises(PlanError, match=r"fc.weight \(48 of 96 elements\)"):
        planned(fresh(Half, 1))


def test_padding_counts_whether_it_is_declared_or_filled() -> None:
    plan = planned(fresh("Embeddings", 1))
    assert plan.in_place == {"embed", "lm_head"}


def test_a_part_of_the_model_may_be_planned_on_purpose() -> None:
    plan = planned(fresh("Fused", 1), without=["layers.0.q_proj.weight"], complete=False)
    assert "layers.0.qkv" in plan.in_place
    part = planned(fresh("ReadsValues", 1), without=["plain.weight"], complete=False)
    assert set(part.opaque) == {"scaled"}


def test_a_clone_of_a_source_is_followed_unless_it_is_changed() -> None:
    plan = planned(fresh("SeenTwice", 1))
    assert plan.in_place == {"fc"}
    assert set(plan.opaque) == {"out"}


def test_a_buffer_of_the_checkpoint_that_is_not_sent_is_reported() -> None:
    """`named_parameters()` has no buffers: the engine keeps its own, and the report says so."""
    host = fresh("Buffers", 1)
    assert planned(host, without=["gate.correction"]).report.kept == []  # computed, for all we know
    host.own_names = set(host.toy.shapes())
    assert planned(host, without=["gate.correction"]).report.kept == ["gate.correction"]
    assert planned(host).report.kept == []


def test_parameters_under_names_that_the_loader_skips_are_shown_side_by_side() -> None:
    """transformers 5 fuses experts in memory: their names there are not those of the checkpoint."""
    with pytest.raises(PlanError, match=r"covers: fc\.weight .*nowhere here: fused") as caught:
        build(fresh("Skips", 1), [spec("fused", 8, 12)])
    assert "push the module" in caught.value.next_step


def test_names_that_end_nowhere_are_reported() -> None:
    host = fresh("Skips", 1)
    plan = build(host, [*specs_of(toys.checkpoint(host.toy, 1)), spec("extra.weight", 3)])
    assert plan.report.nowhere == ["extra.weight"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.0.rotary_emb.inv_freq", "not a weight"),
        ("h.0.attn.masked_bias", "not a weight"),
        ("model.layers.1.fc.weight", "a layer of a draft (MTP) model"),
        ("lm_head.weight", "tied to the input embeddings"),
    ],
)
def test_names_that_the_loader_skips_on_purpose_are_ignored(name: str, why: str) -> None:
    host = fresh("Skips", 1)
    host.tied_head = True
    plan = build(host, [*specs_of(toys.checkpoint(host.toy, 1)), spec(name, 3)])
    assert plan.report.ignored == {name: why}
    assert plan.report.nowhere == []


def test_a_tied_head_is_ignored_where_the_loader_raises_for_it() -> None:
    """As vLLM's Gemma-2; a layer too many is still an error there."""
    host = fresh("Fused", 1)
    host.tied_head = True
    specs = specs_of(toys.checkpoint(host.toy, 1))
    plan = build(host, [*specs, spec("lm_head.weight", 3)])
    assert plan.report.ignored == {"lm_head.weight": "tied to the input embeddings"}
    assert plan.opaque == build(host, specs).opaque
    with pytest.raises(PlanError, match="does not take"):
        build(host, [*specs, spec("layers.2.down.weight", 3)])


def test_what_the_loader_skips_of_the_engines_own_checkpoint_is_ignored() -> None:
    """A head that the model ties whatever its config says, layers of a draft by another name."""
    host = fresh("Skips", 1)
    host.own_names = {"lm_head.weight", "mtp.fc.weight"}
    names = ("lm_head.weight", "mtp.fc.weight", "typo.weight")
    plan = build(host, [*specs_of(toys.checkpoint(host.toy, 1)), *(spec(n, 3) for n in names)])
    assert plan.report.ignored.keys() == host.own_names
    assert plan.report.nowhere == ["typo.weight"]


def test_an_untied_head_and_a_real_layer_are_not_ignored() -> None:
    host = fresh("Skips", 1)
    names = ("lm_head.weight", "model.layers.0.fc.weight", "attn.bias_k")
    plan = build(host, [*specs_of(toys.checkpoint(host.toy, 1)), *(spec(n, 3) for n in names)])
    assert plan.report.nowhere == list(names)


def test_an_unknown_name_that_the_loader_chokes_on_is_named() -> None:
    host = fresh("Fused", 1)
    with pytest.raises(PlanError, match=r"loader does not take layers\.0\.extra") as caught:
        build(host, [*specs_of(toys.checkpoint(host.toy, 1)), spec("layers.0.extra.weight", 3)])
    assert caught.value.where == "layers.0.extra.weight"
    assert "KeyError" in str(caught.value)


def test_a_wrong_shape_is_named_with_the_loaders_words() -> None:
    host = fresh("processed_plain", 1)
    wrong = [spec("before.weight", 12, 12), spec("fc.weight", 8, 11), spec("after.weight", 5, 8)]
    with pytest.raises(PlanError, match=r"Attempted to load weight \(\(8, 11\)\)") as caught:
        build(host, wrong)
    assert caught.value.where == "fc.weight"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float32"])
def test_floats_are_cast(dtype: str) -> None:
    host = fresh("Skips", 1)
    plan = build(host, [spec("fc.weight", 8, 12, dtype=dtype)])
    new = torch.randn(8, 12).to(getattr(torch, dtype))
    update = Update(host, plan)
    update.receive({"fc.weight": new}, lasting=True)
    update.finish()
    assert torch.equal(host.toy.fc.weight, new.to(torch.float32))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "float8_e4m3fn"])
def test_other_casts_are_refused(dtype: str) -> None:
    with pytest.raises(PlanError, match=f"fc.weight: {dtype} cannot become float32"):
        build(fresh("Skips", 1), [spec("fc.weight", 8, 12, dtype=dtype)])


def test_what_a_rank_takes_of_a_name_is_reported() -> None:
    plan = planned(fresh("Fused", 1, 1, 2))
    assert plan.report.consumed["layers.0.down.weight"] == 48
    assert "layers.0.norm.weight" not in plan.report.consumed
    tied = planned(fresh("TiedHeadDropped", 1, 0, 2))
    assert tied.report.consumed == {"embed.weight": 96}  # two places, one part of the source


def test_the_report_adds_up() -> None:
    host = fresh("Fused", 1)
    plan = planned(host)
    specs = specs_of(toys.checkpoint(host.toy, 1))
    assert plan.report.tensors == len(specs)
    assert plan.report.bytes == sum(s.nbytes for s in specs)
    assert plan.report.segments == len(specs)


# ---- ties ---------------------------------------------------------------------------------


def test_retied_embeddings_must_bring_equal_values() -> None:
    host = fresh("Retied", 1)
    plan = planned(host)
    assert [{a.name, b.name} for a, b in plan.must_equal] == [{"embed.weight", "lm_head.weight"}]
    good = toys.checkpoint(host.toy, 2)
    check_equal(plan, good)
    bad = good | {"lm_head.weight": good["lm_head.weight"] + 1e-6}
    with pytest.raises(PlanError, match="brings different values"):
        check_equal(plan, bad)
    with pytest.raises(PlanError, match="brings different values"):
        check_equal(plan, good | {"lm_head.weight": good["lm_head.weight"].double()})
    check_equal(plan, {"embed.weight": bad["embed.weight"]})  # the other is not in this part


def test_two_names_of_one_parameter_must_bring_equal_values() -> None:
    class Both(toys.TiedParameter):
        def shapes(self) -> toys.Shapes:
            return {"embed.weight": (10, 12), "lm_head.weight": (10, 12)}

        def load_weights(self, weights: toys.Weights) -> set[str]:
            for name, w in weights:
                getattr(self, name.split(".")[0]).load(self.embed.weight, w)
            return set()

    plan = planned(fresh(Both, 1))
    assert [{a.name, b.name} for a, b in plan.must_equal] == [{"embed.weight", "lm_head.weight"}]
    assert plan.in_place == {"embed"}


def test_parameters_side_by_side_in_one_allocation_are_not_tied() -> None:
    assert planned(fresh("Carved", 1)).must_equal == []


def test_names_that_overlap_in_part_go_through_the_loader() -> None:
    class Overlap(Toy):
        def make(self) -> None:
            self.fc = Linear(8, 12)

        def shapes(self) -> toys.Shapes:
            return {"all": (8, 12), "some": (2, 12)}

        def load_weights(self, weights: toys.Weights) -> None:
            for _, w in weights:
                self.fc.weight.data[: w.shape[0]].copy_(w)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    plan = planned(fresh(Overlap, 1))
    assert plan.opaque["fc"] in ("all and some overlap", "some and all overlap")
    assert plan.opaque_names == {"all", "some"}
    assert_updates(Overlap, 0, 1)


# ---- updates: equal to a fresh load, bit for bit ------------------------------------------


def at_once(host: ToyHost, plan: LoadPlan, tensors: Tensors) -> None:
    update = Update(host, plan)
    update.receive_all(tensors, Replay(plan, tensors))
    update.finish()


def twice_in_batches(host: ToyHost, plan: LoadPlan, tensors: Tensors) -> None:
    """One registration for two pushes, of other values; as for modules of many copies."""
    replay, right = Replay(plan, tensors), {n: t.clone() for n, t in tensors.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update_module, "MANY", 0)
        for values in ({n: torch.zeros_like(t) for n, t in right.items()}, right):
            for name, t in tensors.items():
                t.copy_(values[name])
            update = Update(host, plan)
            update.receive_all(tensors, replay)
            update.finish()


def in_parts(host: ToyHost, plan: LoadPlan, tensors: Tensors) -> None:
    """Random order, several calls, and memory that is gone after each."""
    update = Update(host, plan)
    names = random.Random(len(tensors)).sample(sorted(tensors), len(tensors))
    while names:
        part, names = names[:2], names[2:]
        passing = {n: tensors[n].clone() for n in part}
        update.receive(passing, lasting=False)
        for t in passing.values():
            t.view(torch.uint8).fill_(0xAA) if t.dim() else t.fill_(9)
    update.finish()


def in_pieces(host: ToyHost, plan: LoadPlan, tensors: Tensors) -> None:
    """Rows in one small buffer that is filled again and again."""
    update = Update(host, plan)
    buffer = torch.empty(1536, dtype=torch.uint8)
    for bucket in cut(specs_of(tensors), len(buffer)):
        buffer.fill_(0xAA)
        rows = [(p, _rows(p, tensors[p.spec.name], buffer)) for p in bucket]
        update.receive_pieces(rows, None)
    update.finish()


def _rows(piece: Piece, tensor: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    place = buffer[piece.offset : piece.offset + piece.nbytes].view(tensor.dtype)
    place = place.view(piece.shape)
    place.copy_(tensor[piece.row : piece.row + piece.rows] if tensor.dim() else tensor)
    return place


def strided(host: ToyHost, plan: LoadPlan, tensors: Tensors) -> None:
    """The trainer's tensors are views: transposed, and with gaps."""
    lying = {}
    for n, t in tensors.items():
        if t.dim() == 2:
            lying[n] = torch.zeros(t.shape[1], t.shape[0] + 1, dtype=t.dtype)[:, 1:].t()
            lying[n].copy_(t)
        else:
            lying[n] = t
    at_once(host, plan, lying)


WAYS: tuple[Callable[[ToyHost, LoadPlan, Tensors], None], ...] = (
    at_once, twice_in_batches, in_parts, in_pieces, strided,
)  # fmt: skip


def assert_equal_to_fresh(host: ToyHost, seed: int) -> None:
    want = fresh(type(host.toy), seed, host.toy.rank, host.toy.world)
    a, b = toys.live_tensors(host.model), toys.live_tensors(want.model)
    assert a.keys() == b.keys()
    assert [n for n in a if not same_bits(a[n], b[n])] == []
    with torch.no_grad():
        got, should = (h.toy(h.toy.inputs()) for h in (host, want))
    assert same_bits(got, should)


def places(host: ToyHost) -> dict[str, tuple[int, int]]:
    rows = (*host.model.named_parameters(), *host.model.named_buffers())
    return {n: (id(t), t.data_ptr()) for n, t in rows}


def assert_updates(kind: str | type[Toy], rank: int, world: int) -> None:
    """1 → 2 → 3 → … each another way, and back to 1, with one plan made from the first."""
    host = fresh(kind, 1, rank, world)
    plan = planned(host)
    before = places(host)
    for seed, way in [*enumerate(WAYS, start=2), (1, at_once)]:
        tensors = {n: t.clone() for n, t in toys.checkpoint(host.toy, seed).items()}
        way(host, plan, tensors)
        for t in tensors.values():  # whatever is still read of the trainer shows
            t.view(torch.uint8).fill_(0xAA) if t.dim() else t.fill_(9)
        assert_equal_to_fresh(host, seed)
    assert places(host) == before


@pytest.mark.parametrize(("kind", "rank", "world"), RANKS)
def test_an_update_equals_a_fresh_load(kind: str, rank: int, world: int) -> None:
    assert_updates(kind, rank, world)


def test_handles_are_freed_once() -> None:
    host = fresh("processed_handle", 1)
    plan = planned(host)
    gc.collect()
    held = len(toys.HEAP.blocks)
    for seed in (2, 3, 4):
        at_once(host, plan, toys.checkpoint(host.toy, seed))
    gc.collect()
    assert toys.HEAP.errors == []
    assert len(toys.HEAP.blocks) == held


def test_packed_tensors_keep_their_memory() -> None:
    """What captured graphs hold: closures and attributes, where their form stays the same."""
    host = fresh("processed_pack_drop", 1)
    plan = planned(host)
    before = {n: t.data_ptr() for n, t in toys.live_tensors(host.model).items()}
    at_once(host, plan, toys.checkpoint(host.toy, 2))
    assert {n: t.data_ptr() for n, t in toys.live_tensors(host.model).items()} == before


def test_an_absorbed_matrix_keeps_its_memory() -> None:
    host = fresh("MLA", 1)
    plan = planned(host)
    before = [t.data_ptr() for t in (host.toy.attn.W_UK, host.toy.attn.W_UV)]
    at_once(host, plan, toys.checkpoint(host.toy, 2))
    assert [t.data_ptr() for t in (host.toy.attn.W_UK, host.toy.attn.W_UV)] == before
    assert_equal_to_fresh(host, 2)


def test_a_module_is_finished_with_its_last_tensor() -> None:
    """At most one module is held in checkpoint form when all tensors come in order."""
    host = fresh("Everything", 1)
    update = Update(host, planned(host))
    for name, t in toys.checkpoint(host.toy, 2).items():
        update.receive({name: t}, lasting=True)
        assert len(update._staged) <= 1


def test_tensors_that_never_came() -> None:
    host = fresh("Fused", 1)
    update = Update(host, planned(host))
    tensors = toys.checkpoint(host.toy, 2)
    del tensors["layers.1.up.weight"]
    update.receive(tensors, lasting=True)
    with pytest.raises(RequestError, match=r"1 announced tensors never came: layers.1.up") as c:
        update.finish()
    assert c.value.where == "layers.1.up.weight"


class TwoTensors(Toy):
    def make(self) -> None:
        self.fc = Linear(8, 12, method=toys.PackEmpty())
        self.fc.bias = toys.param(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.fc.bias


def test_a_tensor_that_comes_twice() -> None:
    """Its module is finished, and the packed weight is in no tensor that could be read back."""
    host = fresh(TwoTensors, 1)
    update = Update(host, planned(host))
    tensors = toys.checkpoint(host.toy, 2)
    update.receive(tensors, lasting=True)
    update.receive({"fc.bias": tensors["fc.bias"]}, lasting=True)
    update.finish()
    assert_equal_to_fresh(host, 2)


def test_tensors_without_elements_need_not_come() -> None:
    class Empty(Toy):
        def make(self) -> None:
            self.fc = Linear(8, 12, method=toys.PackEmpty())
            self.fc.none = toys.param(0, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    assert_updates(Empty, 0, 1)


# ---- moving what processing made ----------------------------------------------------------


class Box:
    def __init__(self, **attrs: Any) -> None:
        self.__dict__.update(attrs)


def poured(old: Any, new: Any) -> bool:
    live = {"x": old}
    process._transplant(live, {"x": new})
    return live["x"] is old


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([t(1), t(2)], [t(3), t(4)]),
        ({"a": t(1), "b": t(2)}, {"b": t(4), "a": t(3)}),
        (Box(w=t(1), s=t(2), n=3), Box(s=t(4), w=t(3), n=3)),
        (functools.partial(max, t(1), key=t(2)), functools.partial(max, t(3), key=t(4))),
        (Box(inner=Box(w=t(1)), on=True, also=True), Box(inner=Box(w=t(3)), on=True, also=True)),
        (Box(none=[], names={"a"}, w=t(1)), Box(none=[], names={"a"}, w=t(3))),
    ],
)
def test_equal_structures_are_filled_where_they_are(old: Any, new: Any) -> None:
    want = {n: v.clone() for n, v in toys.live_tensors(_holder(new)).items()}
    assert poured(old, new)
    got = toys.live_tensors(_holder(old))
    assert {n: v.tolist() for n, v in got.items()} == {n: v.tolist() for n, v in want.items()}


def _holder(x: Any) -> nn.Module:
    m = nn.Module()
    m.__dict__["x"] = x
    return m


def _shared(value: Any) -> list[Any]:
    return [value, value]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ([t(1)], [t(1), t(2)]),
        ([t(1)], (t(3),)),
        ([t(1)], [torch.tensor([1])]),
        ({"a": t(1)}, {"b": t(1)}),
        (Box(w=t(1), s=t(2)), Box(w=t(1), z=t(2))),
        (Box(a=1, b=1, w=t(1)), Box(a=1, b=2, w=t(1))),
        (Box(a=True, b=True), Box(a=True, b=False)),
        (_shared(t(1)), [t(3), t(4)]),
        (_shared([t(1)]), [[t(3)], [t(4)]]),
        (Box(scale=0.5), Box(scale=0.25)),
        (toys.Handle(torch.ones(1, 1)), toys.Handle(torch.ones(1, 1))),
    ],
)
def test_other_structures_are_replaced(old: Any, new: Any) -> None:
    assert not poured(old, new)


def test_a_structure_that_holds_itself() -> None:
    old, new = Box(w=t(1)), Box(w=t(2))
    old.me, new.me = old, new
    assert poured(old, new)
    assert old.w.tolist() == [2]
