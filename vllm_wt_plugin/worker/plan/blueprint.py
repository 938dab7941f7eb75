"""The checkpoint form of a model: what its modules look like between construction and loading.

vLLM's post-load processing packs, quantises and replaces tensors; loaders expect them as they
were built. A `Blueprint` is taken when the model has just been built (the plugin wraps vLLM's
`record_metadata_for_reloading`) and can put any module back into that form, on meta or with real
memory, for as long as a `with` lasts. Everything is put back, whatever happens inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from vllm_wt_plugin.worker.plan.segment import Region

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


Unwrap = Callable[[Any], Any]  # what a tensor's attribute was before the host wrapped it


@dataclass(frozen=True)
class TensorForm:
    """Geometry, class and attributes (`weight_loader`, …) of one tensor in checkpoint form."""

    key: int  # the memory: equal for tied tensors, and for a tensor and its views
    ident: int  # the object: equal for two names of one tensor
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    cls: type[torch.Tensor]
    attrs: dict[str, Any]

    @classmethod
    def of(cls, t: torch.Tensor, unwrap: Unwrap) -> TensorForm:
        attrs = {k: unwrap(v) for k, v in t.__dict__.items()}
        key = hash((t.untyped_storage()._cdata, t.dtype))
        offset = int(t.storage_offset())
        return cls(key, id(t), offset, tuple(t.shape), t.stride(), t.dtype, type(t), attrs)

    def empty(self, device: torch.device | str) -> torch.Tensor:
        return self._dress(
            torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=device)
        )

    def view_of(self, root: torch.Tensor, root_form: TensorForm) -> torch.Tensor:
        """This tensor as the view of `root` that it was when the model was built."""
        offset = root.storage_offset() + self.offset - root_form.offset
        return self._dress(root.detach().as_strided(self.size, self.stride, offset))

    def _dress(self, t: torch.Tensor) -> torch.Tensor:
        t.__class__ = self.cls
        t.__dict__ = dict(self.attrs)
        return t

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    def holds(self, other: TensorForm) -> bool:
        """Does `other`, of the same storage, lie within this one's first and last element?"""
        a, b = (Region(f.offset, f.size, f.stride) for f in (self, other))
        return not b.numel or (a.offset <= b.offset and b.last <= a.last)

    def same_geometry(self, t: torch.Tensor | None) -> bool:
        return (
            t is not None
            and tuple(t.shape) == self.size
            and t.stride() == self.stride
            and t.dtype == self.dtype
        )


@dataclass
class ModuleForm:
    """One module before loading: tensors, plain attributes, its processor's attributes."""

    params: dict[str, TensorForm]
    buffers: dict[str, TensorForm]
    non_persistent: set[str]
    attrs: dict[str, Any]
    processor_attrs: dict[str, Any] | None
    lazy: list[str] = field(default_factory=list)  # parameters whose shape loading decides
    none_params: list[str] = field(default_factory=list)  # registered, without a tensor
    none_buffers: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, TensorForm]:
        return self.params | self.buffers


Make = Callable[[nn.Module, str, TensorForm], torch.Tensor]


def processor_of(module: nn.Module) -> Any | None:
    """The object whose `process_weights_after_loading(module)` computes the live form, if any."""
    method = getattr(module, "quant_method", None)
    return method if hasattr(method, "process_weights_after_loading") else None


def tensors_of_module(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's own parameters and buffers, by their names in it; absent ones left out."""
    rows: dict[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
    return {n: t for n, t in rows.items() if t is not None}


class Blueprint:
    """The checkpoint form of every module of one model. Not thread-safe; used between steps."""

    def __init__(self, model: nn.Module, unwrap: Unwrap = lambda value: value) -> None:
        # Keyed by identity, which survives the renaming that LoRA wrappers do. The modules live
        # as long as their model, which owns this object.
        self._forms: dict[nn.Module, ModuleForm] = {m: _form(m, unwrap) for m in model.modules()}
        # Of the tensors that share a key, the one all others are views of.
        self._roots: dict[int, tuple[nn.Module, str, TensorForm]] = {}
        rows = [(m, n, f) for m, form in self._forms.items() for n, f in form.tensors.items()]
        for m, name, f in sorted(rows, key=lambda row: -row[2].numel):
            self._root(m, name, f)

    def _root(self, module: nn.Module, name: str, form: TensorForm) -> None:
        """Note the tensor whose view this one is; one beside it in its storage gets a new key."""
        key = form.key
        while not (root := self._roots.setdefault(key, (module, name, form))[2]).holds(form):
            key = hash((key, root.offset))
        if key != form.key:
            tensors = self._forms[module]
            rows = tensors.params if name in tensors.params else tensors.buffers
            rows[name] = replace(form, key=key)
            if root is form:
                self._roots[key] = (module, name, rows[name])

    def form(self, module: nn.Module) -> ModuleForm | None:
        return self._forms.get(module)

    def tied(self, make: Make) -> Callable[[TensorForm], torch.Tensor]:
        """The tensor of a form, by `make`: tied ones are made once, views are views again."""
        made: dict[int, torch.Tensor] = {}

        def tensor(form: TensorForm) -> torch.Tensor:
            if form.ident not in made:
                root = self._roots[form.key]
                if form.ident == root[2].ident:
                    made[form.ident] = make(*root)
                else:
                    made[form.ident] = form.view_of(tensor(root[2]), root[2])
            return made[form.ident]

        return tensor

    @contextmanager
    def checkpoint_form(
        self,
        model: nn.Module,
        make: Make,
    ) -> Iterator[None]:
        """All of `model` in checkpoint form; `make(module, tensor name, form)` gives the tensors.

        On leaving, parameters, buffers and every `__dict__` (some loaders set plain attributes)
        are what they were.
        """
        modules = [m for m in model.modules() if m in self._forms]
        saved = [_Saved(m) for m in modules]
        tensor = self.tied(make)
        try:
            for m in modules:
                _enter(m, self._forms[m], lambda _, form: tensor(form))
            yield
        finally:
            for s in saved:
                s.restore()

    @contextmanager
    def module_form(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """One module (and its processor) as before loading, holding `tensors`; then put back."""
        saved = _Saved(module)
        try:
            _enter(module, self._forms[module], lambda n, _: tensors[n])
            yield
        finally:
            saved.restore()


def _form(module: nn.Module, unwrap: Unwrap) -> ModuleForm:
    lazy = [n for n, p in module._parameters.items() if p is not None and nn.parameter.is_lazy(p)]
    processor = processor_of(module)
    return ModuleForm(
        params={
            n: TensorForm.of(p, unwrap)
            for n, p in module._parameters.items()
            if p is not None and n not in lazy
        },
        buffers={n: TensorForm.of(b, unwrap) for n, b in module._buffers.items() if b is not None},
        non_persistent=set(module._non_persistent_buffers_set),
        attrs={k: v for k, v in module.__dict__.items() if k not in REGISTRIES},
        processor_attrs=None if processor is None else dict(vars(processor)),
        lazy=lazy,
        none_params=[n for n, p in module._parameters.items() if p is None],
        none_buffers=[n for n, b in module._buffers.items() if b is None],
    )


def _enter(
    module: nn.Module, form: ModuleForm, tensor: Callable[[str, TensorForm], torch.Tensor]
) -> None:
    registries = {k: module.__dict__[k] for k in REGISTRIES}
    processor = processor_of(module)
    module.__dict__.clear()
    module.__dict__.update(form.attrs)
    module.__dict__.update(registries)
    if processor is not None and form.processor_attrs is not None:
        vars(processor).clear()
        vars(processor).update(form.processor_attrs)
    module._parameters.clear()
    module._parameters.update(dict.fromkeys(form.none_params))
    module._parameters.update({n: tensor(n, f) for n, f in form.params.items()})  # type: ignore[misc]
    module._buffers.clear()
    module._buffers.update(dict.fromkeys(form.none_buffers))
    module._buffers.update({n: tensor(n, f) for n, f in form.buffers.items()})
    module._non_persistent_buffers_set.clear()
    module._non_persistent_buffers_set.update(form.non_persistent)


class _Saved:
    """A module's live state, by reference: nothing is copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.attrs = dict(module.__dict__)
        self.params = dict(module._parameters)
        self.buffers = dict(module._buffers)
        self.children = dict(module._modules)
        self.non_persistent = set(module._non_persistent_buffers_set)
        self.processor = processor_of(module)
        self.processor_attrs = None if self.processor is None else dict(vars(self.processor))

    def restore(self) -> None:
        m = self.module
        m.__dict__.clear()
        m.__dict__.update(self.attrs)
        tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (m._parameters, self.params),
            (m._buffers, self.buffers),
            (m._modules, self.children),
        ]
        for live, kept in tables:
            live.clear()
            live.update(kept)
        m._non_persistent_buffers_set.clear()
        m._non_persistent_buffers_set.update(self.non_persistent)
        if self.processor is not None and self.processor_attrs is not None:
            vars(self.processor).clear()
            vars(self.processor).update(self.processor_attrs)
