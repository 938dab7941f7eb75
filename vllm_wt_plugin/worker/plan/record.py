"""Ask the model's own `load_weights` once where every checkpoint tensor goes.

The sources are meta tensors (no memory), the model is in checkpoint form on meta, and a dispatch
mode watches every operation: a `copy_` from a source (or a view of one) into a model tensor is a
segment; everything else that touches a source or a model tensor makes recording distrust it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.blueprint import REGISTRIES, Blueprint, tensors_of_module
from vllm_wt_plugin.worker.plan.ops import is_view, storage_key, tensors_of, written_by
from vllm_wt_plugin.worker.plan.segment import Fill, Region, Segment, Target

Written = tuple[Target, Region]
Load = Callable[[Iterable[tuple[str, torch.Tensor]]], Any]
aten = torch.ops.aten


@dataclass
class Recording:
    """What one pass of `load_weights` did.

    `opaque_targets`: model tensors written other than by a copy, and why. `opaque_names`: sources
    read other than by a copy, and why. `written`: what was written of opaque targets. `dropped`:
    names whose loader raised, with its words; nothing of them is recorded.
    """

    segments: list[Segment] = field(default_factory=list)
    fills: list[Fill] = field(default_factory=list)
    opaque_targets: dict[Target, str] = field(default_factory=dict)
    opaque_names: dict[str, str] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


class WriteToLive(RuntimeError):
    """A loader tried to write memory that is not ours to write while recording."""


def record(
    model: nn.Module,
    blueprint: Blueprint,
    load: Load,
    specs: Iterable[ParamSpec],
    ignorable: Callable[[str], object] = lambda _: False,
) -> Recording:
    """Run `load` on meta tensors of `specs`. The model is as before when this returns.

    Where the loader raises, the group of the name it was at (the same module in every layer) is
    dropped and the pass is made again without it; an `ignorable` name is left out alone.
    """
    todo = {s.name: s for s in specs}
    dropped: dict[str, str] = {}
    while True:
        result, culprit = _one_pass(model, blueprint, load, list(todo.values()))
        if culprit is None:
            result.dropped = dropped
            return result
        name, why = culprit
        if ignorable(name):
            del todo[name]
            continue
        group = [n for n in todo if _template_parent(n) == _template_parent(name)]
        for n in group or [name]:
            dropped[n] = why
            del todo[n]


def _template_parent(name: str) -> str:
    """`model.layers.3.mlp.experts.7.w1.weight` → `model.layers.*.mlp.experts.*.w1`."""
    return ".".join("*" if p.isdigit() else p for p in name.split(".")[:-1])


def _one_pass(
    model: nn.Module, blueprint: Blueprint, load: Load, specs: list[ParamSpec]
) -> tuple[Recording, tuple[str, str] | None]:
    recorder = _Recorder()
    with (
        torch.no_grad(),
        blueprint.checkpoint_form(model, lambda m, n, f: f.empty("meta")),
    ):
        before = _attributes(model)
        recorder.watch(model)
        sources = [(s.name, recorder.source(s)) for s in specs]
        try:
            with recorder:
                load(recorder.feed(sources))
        # The loader is foreign code on tensors it does not expect: whatever it raises means that
        # this name cannot be recorded, and the name then goes through the same code for real.
        except Exception as exc:
            if not sources:
                raise
            name = recorder.at or sources[-1][0]
            return recorder.out, (name, f"{type(exc).__name__}: {exc}"[:500])
        recorder.compare(model, before)
    return recorder.out, None


def _attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {k: v for k, v in m.__dict__.items() if k not in REGISTRIES}
        for name, m in model.named_modules()
    }


Place = tuple[int, Region, torch.dtype]


def _place(t: torch.Tensor) -> Place:
    return storage_key(t), Region.of(t), t.dtype


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.out = Recording()
        self.at: str | None = None  # the name last handed out or touched
        self._sources: dict[int, str] = {}
        self._targets: dict[int, list[tuple[Target, torch.Tensor]]] = {}
        self._watched: dict[str, dict[str, tuple[torch.Tensor, Place]]] = {}
        self._tainted: dict[int, set[str]] = {}  # other storages that hold source values
        self._own: set[int] = set()  # real storages made while recording
        self._keep: list[torch.Tensor] = []  # a freed storage's address must not come again

    def source(self, spec: ParamSpec) -> torch.Tensor:
        t = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        self._sources[storage_key(t)] = spec.name
        self._keep.append(t)
        return t

    def feed(self, sources: list[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, t in sources:
            self.at = name
            yield name, t

    def watch(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            tensors = tensors_of_module(module)
            self._watched[name] = {n: (t, _place(t)) for n, t in tensors.items()}
            for tname, t in tensors.items():
                self._targets.setdefault(storage_key(t), []).append(((name, tname), t))
                self._keep.append(t)
        for rows in self._targets.values():  # of a tensor and its views, name the whole
            rows.sort(key=lambda row: -row[1].numel())

    def compare(self, model: nn.Module, before: dict[str, dict[str, Any]]) -> None:
        """Find what no operation shows: replaced tensors, `.data =`, new plain attributes."""
        for name, module in model.named_modules():
            now, watched = tensors_of_module(module), self._watched.get(name, {})
            for tname in now.keys() | watched.keys():
                old, place = watched.get(tname, (None, None))
                new = now.get(tname)
                if old is new and new is not None and _place(new) == place:
                    continue
                self._kept((name, tname), new, "the loader replaces this tensor")
                if place is not None and new is not None:
                    self.out.written.append((self._targets[place[0]][0][0], place[1]))
            old_attrs = before.get(name, {})
            for k, v in module.__dict__.items():
                if k in REGISTRIES or (k in old_attrs and old_attrs[k] is v):
                    continue
                empty = isinstance(v, (list, tuple, dict, set)) and not v
                if not empty and not isinstance(v, (bool, int, float, str, type(None))):
                    self._kept((name, k), v, "the loader sets this attribute")

    def _kept(self, target: Target, value: Any, why: str) -> None:
        self.out.opaque_targets[target] = why
        for t in tensors_of(value):
            if (name := self._sources.get(storage_key(t))) is not None:
                self.out.opaque_names.setdefault(name, "kept by the loader")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default and self._copy(args[0], args[1]):
            return args[0]
        if func in (aten.fill_.Scalar, aten.zero_.default) and self._targets.get(
            storage_key(args[0])
        ):
            value = 0.0 if func is aten.zero_.default else float(args[1])
            target, _ = self._targets[storage_key(args[0])][0]
            self.out.fills.append(Fill(target, Region.of(args[0]), value))
            return args[0]
        # Through another dtype a copy moves bits, which a copy of values does not.
        if is_view(func) and func is not aten.view.dtype:
            return func(*args, **kwargs)
        if func is aten.clone.default and self._whole(args[0]):
            return self._clone(func, args, kwargs)
        return self._other(func, args, kwargs)

    def _whole(self, t: torch.Tensor) -> bool:
        """Is `t` all of a source, element by element?"""
        size = t.untyped_storage().nbytes()
        return storage_key(t) in self._sources and t.is_contiguous() and t.nbytes == size

    def _clone(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """A clone of a whole source stands for it: pooling models look for their prefix in clones
        of the first names."""
        out: torch.Tensor = func(*args, **kwargs)
        if not out.is_contiguous():
            return self._other(func, args, kwargs)  # type: ignore[no-any-return]
        self._sources[storage_key(out)] = self._sources[storage_key(args[0])]
        self._keep.append(out)
        return out

    def _copy(self, dst: torch.Tensor, src: torch.Tensor) -> bool:
        name, rows = self._sources.get(storage_key(src)), self._targets.get(storage_key(dst))
        if name is None or rows is None:
            return False
        if name in self.out.opaque_names or dst.dtype != rows[0][1].dtype:
            return False
        self.at = name
        view = src.expand(dst.shape)
        self.out.segments.append(Segment(name, Region.of(view), rows[0][0], Region.of(dst)))
        return True

    def _other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Any other operation: note what it read and wrote, refuse writes to real memory."""
        tensors = list(tensors_of((args, kwargs)))
        written = list(written_by(func, args, kwargs))
        carried: set[str] = set()
        for t in tensors:
            key = storage_key(t)
            if (name := self._sources.get(key)) is not None:
                self.at = name
                self.out.opaque_names[name] = f"read by {func}"
                carried.add(name)
            carried |= self._tainted.get(key, set())
            if key in self._targets and not any(t is w for w in written):
                self._blame(key, f"read by {func}")
        for t in written:
            if storage_key(t) in self._targets:
                self._blame(storage_key(t), f"written by {func}")
                self.out.written.append(_written(t, *self._targets[storage_key(t)][0]))
            elif t.device.type != "meta" and storage_key(t) not in self._own:
                raise WriteToLive(f"{func} would write a live tensor of shape {tuple(t.shape)}")
            elif carried:
                self._tainted.setdefault(storage_key(t), set()).update(carried)
        result = func(*args, **kwargs)
        for t in tensors_of(result):
            if not any(t is w for w in written):
                self._keep.append(t)
                if t.device.type != "meta":
                    self._own.add(storage_key(t))
                if carried:
                    self._tainted.setdefault(storage_key(t), set()).update(carried)
        return result

    def _blame(self, key: int, why: str) -> None:
        for target, _ in self._targets[key]:
            self.out.opaque_targets.setdefault(target, why)


class Writes(TorchDispatchMode):
    """Which elements of a model's tensors are written, by whatever operation or assignment."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Written] = []
        self._model = model
        self._before = {target: (t, _place(t)) for target, t in _tensors(model)}
        # Of a tensor and its views, the whole comes last and stays.
        rows = sorted(self._before.items(), key=lambda row: row[1][0].numel())
        self._targets = {place[0]: (target, t) for target, (t, place) in rows}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in written_by(func, args, kwargs or {}):
            if (whole := self._targets.get(storage_key(t))) is not None:
                self.found.append(_written(t, *whole))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        now = dict(_tensors(self._model))
        for target, (old, place) in self._before.items():
            if target in now and (now[target] is not old or _place(old) != place):
                self.found.append((self._targets[place[0]][0], place[1]))


def _written(t: torch.Tensor, target: Target, whole: torch.Tensor) -> Written:
    """`t`, a view of `whole`; through another dtype its elements are not counted."""
    return target, Region.of(t if t.dtype == whole.dtype else whole)


def _tensors(model: nn.Module) -> Iterator[tuple[Target, torch.Tensor]]:
    for name, module in model.named_modules():
        for tensor, t in tensors_of_module(module).items():
            yield (name, tensor), t
