"""What the load plan needs to know of the program that runs the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from vllm_wt_plugin.errors import PlanError
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.blueprint import Blueprint, TensorForm
from vllm_wt_plugin.worker.plan.segment import Target

Hook = Callable[[], None]  # one post-load hook, bound to its module


class Host(Protocol):
    """The program that runs the model: vLLM (`_vllm.py: VllmHost`), or toys in tests."""

    model: nn.Module
    blueprint: Blueprint
    device: torch.device
    num_hidden_layers: int | None
    tied_head: bool

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        """The model's own loader."""

    def checkpoint(self) -> tuple[ParamSpec, ...]:
        """What the checkpoint holds that the model was started from."""

    def checkpoint_names(self) -> frozenset[str]:
        """The names alone, without reading a tensor; empty where they cannot be known."""

    def hook(self, module: nn.Module) -> Hook | None:
        """The processing of one layer after loading, if it has any."""

    def late_hooks(self) -> dict[str, tuple[nn.Module, Hook]]:
        """Hooks that run after all layers' (attention, then the model's own), by module name."""

    def context(self) -> AbstractContextManager[object]:
        """Active around everything that runs the host's code."""

    def loadable(self, t: torch.Tensor) -> int:
        """Elements a checkpoint must fill of a tensor in checkpoint form (padding excluded)."""


def form_of(host: Host, target: Target) -> TensorForm:
    """The checkpoint form of one tensor."""
    form = host.blueprint.form(host.model.get_submodule(target[0]))
    if form is None:  # recording only sees modules of the blueprint
        raise PlanError("module was made after the model was built", where=target[0])
    return form.tensors[target[1]]
