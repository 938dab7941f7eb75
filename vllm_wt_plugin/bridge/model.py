"""A transformers model whose parameters are views of given memory, and never had any of their own.

skeleton (parameters on meta, buffers real) → wanted (checkpoint names) → install (views)
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from vllm_wt_plugin.errors import PlanError, RequestError
from vllm_wt_plugin.trainer import fused
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.views import Box, NoView, view_of


def skeleton(name: str) -> nn.Module:
    """The causal language model of a config that transformers reads, without weights.

    Parameters are on meta; buffers (rotary tables) are computed, on the CPU.
    """
    transformers = _transformers()
    config = _read(name, "config", transformers.AutoConfig.from_pretrained)
    with _unallocated():
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def loaded(name: str, device: torch.device) -> nn.Module:
    """The causal language model of a checkpoint that transformers reads, in its own dtype."""
    load = partial(_transformers().AutoModelForCausalLM.from_pretrained, dtype="auto")
    model: nn.Module = _read(name, "model", load)
    return model.to(device)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise RequestError(
            "a trainable model is built with the `transformers` package",
            next_step="pip install transformers",
        ) from None


def _read(name: str, what: str, read: Callable[[str], Any]) -> Any:
    try:
        return read(name)
    except (OSError, ValueError) as exc:
        raise RequestError(
            f"transformers reads no {what} from it: {exc}"[:500],
            where=f"model_name {name!r}",
            next_step="give the folder or the name that vLLM serves",
        ) from exc


class _Empty(TorchFunctionMode):
    """`torch.empty`, from which modules make their weights, gives none; tables are computed."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _unallocated() -> Iterator[None]:
    def to_meta(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        with _Empty():
            yield
    finally:
        hook.remove()


class Layout:
    """What a model's parameters and saved buffers are in checkpoint names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._state = fused.drop_ties(model, fused.named_state(model))
        self._pieces = fused.plan(fused.conversion(model), self._state)
        for piece in self._pieces:
            if piece.stride is None:
                raise PlanError(
                    "transformers computes this tensor when it saves the model, so that "
                    f"{', '.join(piece.sources)} cannot be a view of it",
                    where=piece.name,
                    next_step="push copies with WeightSync",
                )

    @property
    def specs(self) -> tuple[ParamSpec, ...]:
        """Every checkpoint tensor of the model."""
        return tuple(
            ParamSpec(p.name, str(p.dtype).removeprefix("torch."), p.shape) for p in self._pieces
        )

    def install(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        """Make every parameter a view of `tensors` (checkpoint names), and move buffers to
        `device`. Tied names stay one parameter. Raises PlanError naming what has no view."""
        views = self._views(tensors)
        new: dict[int, Tensor] = {}
        for name, old in self._state.items():
            view = views[name]
            new[id(old)] = (
                nn.Parameter(view, requires_grad=old.requires_grad and view.is_floating_point())
                if isinstance(old, nn.Parameter)
                else view
            )
        for module in self.model.modules():
            _replace(module._parameters, lambda t: new.get(id(t), t))
            _replace(module._buffers, lambda t: new.get(id(t), t if t.is_meta else t.to(device)))
        self._check()

    def _views(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts: dict[str, list[fused.Piece]] = defaultdict(list)
        for piece in self._pieces:
            parts[piece.sources[0]].append(piece)
        views, wrong = {}, {}
        for name, old in self._state.items():
            try:
                views[name] = _view(old, parts[name], tensors)
            except NoView as exc:
                wrong[name] = str(exc)
        if wrong:
            rows = [f"{name}: {why}" for name, why in wrong.items()]
            raise PlanError(
                f"{len(rows)} parameters have no view of vLLM's memory: " + "; ".join(rows[:20]),
                where=next(iter(wrong)),
                next_step="compare the model with the one that is served, or push copies with "
                "WeightSync",
            )
        return views

    def _check(self) -> None:
        left = [n for n, t in self.model.named_parameters() if t.is_meta]
        left += [n for n, t in self.model.named_buffers() if t.is_meta]
        if left:
            raise PlanError(
                f"{len(left)} tensors are in no checkpoint and cannot be built: "
                + ", ".join(left[:20]),
                where=left[0],
                next_step="push copies with WeightSync",
            )


def _replace(table: dict[str, Any], change: Callable[[Tensor], Tensor]) -> None:
    table.update({k: change(t) for k, t in table.items() if t is not None})


def _view(old: Tensor, pieces: list[fused.Piece], tensors: Mapping[str, Tensor]) -> Tensor:
    found = []
    for piece in pieces:
        live = tensors.get(piece.name)
        if live is None:
            raise NoView(f"{piece.name} is not there")
        if tuple(live.shape) != piece.shape:
            raise NoView(f"{piece.name} has shape {tuple(live.shape)} instead of {piece.shape}")
        found.append((piece, live))
    first = found[0][1] if found else old
    if any(t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
           or t.dtype != first.dtype for _, t in found):  # fmt: skip
        raise NoView("its parts lie in several tensors of vLLM, or have several dtypes")
    boxes = [
        Box(p.shape, p.offset, p.stride or (), int(t.storage_offset()), t.stride())
        for p, t in found
    ]
    offset, stride = view_of(tuple(old.shape), boxes)
    return first.detach().as_strided(tuple(old.shape), stride, offset)
