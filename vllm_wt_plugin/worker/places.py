"""Where the elements of each checkpoint tensor live on this rank, as rows for patches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import msgspec
import torch

from vllm_wt_plugin.errors import PlanError
from vllm_wt_plugin.sparse.checksum import checksum_region, seed
from vllm_wt_plugin.sparse.patch import WORDS, Group, check_known, index_dtype
from vllm_wt_plugin.sparse.scatter import Layers, Row, Scatter, Table, layers, row, table
from vllm_wt_plugin.wire.params import ParamSpec, itemsize
from vllm_wt_plugin.wire.patches import Part
from vllm_wt_plugin.worker.plan.blueprint import tensors_of_module
from vllm_wt_plugin.worker.plan.ops import storage_key
from vllm_wt_plugin.worker.plan.plan import LoadPlan

Tensors = Mapping[str, torch.Tensor]


class Places:
    """The rows of one plan's tensors, found when first asked for. The live model's own memory, or,
    for a tensor that vLLM computes another form of, its copy in `shadow` (on the host)."""

    def __init__(self, plan: LoadPlan, shadow: Tensors) -> None:
        self.plan, self.shadow = plan, shadow
        self.whole = plan.report.whole
        self.served = {
            n: ParamSpec(n, plan.report.stored.get(n, s.dtype), s.shape)
            for n, s in plan.specs.items()
        }
        self._rows: dict[str, Layers] = {}
        self._tables: dict[tuple[torch.device, int, torch.dtype], Table] = {}
        self._held: dict[str, tuple[bool, str]] = {}

    def rows(self, name: str) -> Layers:
        """In layers (`sparse/scatter.py`). Raises PlanError for a tensor that takes no patches."""
        if name in self.whole:
            return [[_whole_row(self._shadowed(name))]]
        if name not in self._rows:
            self._rows[name] = live_rows(self.plan, name) or []
        return self._rows[name]

    def check(self, specs: tuple[ParamSpec, ...]) -> None:
        """These tensors, in these shapes and dtypes, are what the engine holds."""
        if specs:
            check_known(specs, self.served)

    def scatter(self, group: Group) -> Scatter:
        """Where a group of patches goes; tables are made with the first one of its widths."""
        if self.whole:
            for name in self.whole.keys() & {s.name for s in group.specs}:
                self._shadowed(name)
        like = group.values.device, group.values.element_size(), group.indices.dtype
        if like not in self._tables:
            numels = {
                n: s.numel
                for n, s in self.served.items()
                if like[1:] == (itemsize(s.dtype, n), index_dtype(s.numel))
                and (n in self.shadow if n in self.whole else True)
            }
            self._tables[like] = table({n: self.rows(n) for n in numels}, numels, group)
        return self._tables[like].scatter(group)

    def _shadowed(self, name: str) -> torch.Tensor:
        if name not in self.shadow:
            users = [m for m, _ in self.plan.by_name.get(name, ())]
            reasons = self.plan.processed | self.plan.opaque
            why = next((f"{m}: {reasons[m]}" for m in users if m in reasons), "it is shared")
            raise PlanError(
                f"this tensor takes no patches ({why})",
                where=name,
                next_step="send it in full in the same update (`whole`), serve with "
                """--additional-config '{"wt": {"shadow": "cpu"}}' and push once dense, """
                "or push dense",
            )
        return self.shadow[name]

    @cached_property
    def grouped(self) -> set[str]:
        """Tensors that must come together with others."""
        sizes = Counter(self.whole.values())
        return {n for n, label in self.whole.items() if sizes[label] > 1}

    def group_of(self, names: Iterable[str]) -> set[str]:
        """All tensors that must come together with these, which take no patches."""
        labels = {self.whole[n] for n in names if n in self.whole}
        return {n for n, label in self.whole.items() if label in labels}

    def sums_of(self, names: Collection[str]) -> dict[str, list[Part]]:
        """As `sums`; of all tensors where none is named. Raises PlanError for an unknown name."""
        for name in names:
            self.spec(name)
        if names or self.shadow:  # whose tensors are others after each dense push
            return self.sums(names or self.served)
        return self._all.begin()()

    def spec(self, name: str) -> ParamSpec:
        """As the engine holds it. Raises PlanError for an unknown name."""
        if name not in self.served:
            raise PlanError("the engine's plan has no such tensor", where=name)
        return self.served[name]

    def sums(self, names: Iterable[str]) -> dict[str, list[Part]]:
        """Checksums of what this rank holds, part by part; reads all of it. Blocking."""
        return self.begin_sums(names)()

    def begin_sums(self, names: Iterable[str]) -> Callable[[], dict[str, list[Part]]]:
        """The same, on a GPU behind what the current stream was given; the result waits for it."""
        return self._summed(names).begin()

    @cached_property
    def _all(self) -> _Summed:
        return self._summed(self.served)

    def _summed(self, names: Iterable[str]) -> _Summed:
        parts = [
            (name, r)
            for name in names
            if name not in self.whole or name in self.shadow
            for r in (self.rows(name) or [[]])[0]
        ]
        return _Summed(parts)

    @cached_property
    def alone(self) -> bool:
        """Whether this rank has all or nothing of every tensor that takes patches."""
        held = map(self.held, self.served.keys() - self.whole.keys())
        return all(every or not part for every, part in held)

    def held(self, name: str) -> tuple[bool, str]:
        """Whether every element of the tensor is on this rank, and which are ("": none)."""
        if name not in self._held:
            own = (self.rows(name) or [[]])[0]
            every = bool(own) and sum(r.numel for r in own) == self.served[name].numel
            self._held[name] = every, part_key(own) if own else ""
        return self._held[name]


def live_rows(plan: LoadPlan, name: str) -> Layers | None:
    """Rows in live memory, of in-place modules; None if an index alone does not tell the place."""
    found = []
    for module, seg in plan.by_name.get(name, ()):
        live = tensors_of_module(plan.modules[module])[seg.target[1]]
        found.append(row(seg.source, seg.dest.of_tensor(live.detach())))
    known = [r for r in found if r is not None]
    return layers(known) if len(known) == len(found) else None


def describe_patching(plan: LoadPlan, shadowed: bool) -> None:
    """Add to the plan's report what a trainer of patches must know: `stored` and `whole`."""
    stored: dict[str, str] = {}
    alone: list[set[str]] = [{a.name, b.name} for a, b in plan.must_equal]
    alone += [{s.name for s in plan.segments.get(m, [])} for m in plan.processed]
    alone.append(set(plan.opaque_names))
    tied = {
        storage_key(t) for m in plan.followers for t in tensors_of_module(plan.modules[m]).values()
    }
    computed = plan.computed_names
    for name, rows in plan.by_name.items():
        if name in computed:
            continue
        live = [tensors_of_module(plan.modules[m])[s.target[1]] for m, s in rows]
        dtypes = {str(t.dtype).removeprefix("torch.") for t in live}
        followed = any(storage_key(t) in tied for t in live)
        if len(dtypes) > 1 or followed or live_rows(plan, name) is None:
            alone.append({name})
        elif dtypes != {plan.specs[name].dtype}:
            stored[name] = dtypes.pop()
    plan.report = msgspec.structs.replace(
        plan.report, stored=stored, whole=_labelled(alone), shadowed=shadowed
    )


def _labelled(sets: list[set[str]]) -> dict[str, str]:
    """Sets that share a name become one; each name with its set's smallest."""
    merged: list[set[str]] = []
    for names in filter(None, sets):
        joined = set(names)
        for other in [m for m in merged if m & joined]:
            joined |= other
            merged.remove(other)
        merged.append(joined)
    return {n: min(names) for names in merged for n in names}


def part_key(rows: Iterable[Row]) -> str:
    """Equal on two ranks that hold the same elements of a tensor."""
    return repr(sorted(r.source for r in rows))


def _whole_row(t: torch.Tensor) -> Row:
    flat = t.view(-1).view(WORDS[t.element_size()])
    return Row(flat, 0, ((max(t.numel(), 1), 1, 1),))


class _Summed:
    """Parts of tensors whose checksums are taken, as often as wanted."""

    def __init__(self, parts: list[tuple[str, Row]]) -> None:
        self._names = [(name, part_key([r])) for name, r in parts]
        self._host = [(i, n, r) for i, (n, r) in enumerate(parts) if not r.dest.is_cuda]
        self._gpu = [i for i, (_, r) in enumerate(parts) if r.dest.is_cuda]
        self._begin: Callable[[], Callable[[], list[int]]] = lambda: list
        if self._gpu:
            from vllm_wt_plugin.sparse.cuda_sums import CudaSums

            on_gpu = (parts[i] for i in self._gpu)
            self._begin = CudaSums([(seed(n), r) for n, r in on_gpu]).begin

    def begin(self) -> Callable[[], dict[str, list[Part]]]:
        found = {i: _sum(n, r) for i, n, r in self._host}
        begun = self._begin()

        def result() -> dict[str, list[Part]]:
            every = found | dict(zip(self._gpu, begun(), strict=True))
            out: dict[str, list[Part]] = {}
            for i, (name, key) in enumerate(self._names):
                out.setdefault(name, []).append((key, every[i]))
            return out

        return result


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _sum(name: str, r: Row) -> int:
    size, source, dest = (tuple(d[i] for d in r.dims) for i in range(3))
    part = r.dest.as_strided(size, dest, int(r.dest.storage_offset()))
    return checksum_region(name, part, _Place(r.offset, size, source))
