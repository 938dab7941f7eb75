"""`WeightTransferEngine`, for programs that construct and drive one themselves.

An engine that vLLM makes is `worker/engine.py`; this one needs no vLLM: it takes what a trainer
sends and hands it to `load_weights` or `apply_patches`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar

import torch

from vllm_wt_plugin.sparse.patch import SparseWeightPatch
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.update import UpdateInfo

Load = Callable[[list[tuple[str, torch.Tensor]]], object]
ApplyPatches = Callable[[list[SparseWeightPatch]], object]
T = TypeVar("T")


class WeightTransferEngine(ABC):
    """Constructed as vLLM's factory does, (config, vllm_config, device, model), or in the older
    form, (config, parallel_config, model=None). A backend names its two dataclasses."""

    init_info_cls: ClassVar[type[Any]]
    update_info_cls: ClassVar[type[Any]]

    def __init__(
        self,
        config: Any,
        parallel_config: Any,
        device: Any = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        whole = hasattr(parallel_config, "parallel_config")  # a vllm_config
        if not whole and isinstance(device, torch.nn.Module):
            device, model = None, device
        self.config, self.model = config, model
        self.vllm_config = parallel_config if whole else None
        self.parallel_config = parallel_config.parallel_config if whole else parallel_config
        self.device: torch.device | None = device

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """Raises ValueError."""
        return self._parse("init_info", self.init_info_cls, init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> Any:
        """Raises ValueError."""
        return self._parse("update_info", self.update_info_cls, update_dict)

    def _parse(self, what: str, kind: type[Any], given: dict[str, Any]) -> Any:
        try:
            return kind(**given)
        except (TypeError, ValueError) as exc:
            raise ValueError(f"Invalid {what} for {type(self).__name__}: {exc}") from exc

    @abstractmethod
    def init_transfer_engine(self, init_info: Any) -> None:
        """Meet the trainer."""

    @abstractmethod
    def receive_weights(self, update_info: Any, load_weights: Load | None = None) -> None:
        """Receive one update's tensors and give them to `load_weights` (default: the model's).
        Blocking. Raises ValueError for an update that is not dense."""

    @abstractmethod
    def receive_sparse_weights(self, update_info: Any, apply_patches: ApplyPatches) -> None:
        """Receive one update's patches and give them all to `apply_patches`. Blocking. Raises
        ValueError for an update that is not sparse."""

    @abstractmethod
    def shutdown(self) -> None:
        """Let go of the trainer. Idempotent."""

    @staticmethod
    @abstractmethod
    def trainer_send_weights(*args: Any, **kwargs: Any) -> None:
        """Send into the update that is open. Blocking. Raises ValueError for arguments that do
        not fit."""

    @staticmethod
    @abstractmethod
    def trainer_send_sparse_weights(
        iterator: Iterable[SparseWeightPatch], trainer_args: Any
    ) -> None:
        """Patches into the update that is open. Blocking. Raises ValueError, RequestError."""

    def _load(self, load_weights: Load | None) -> Load:
        load = load_weights or getattr(self.model, "load_weights", None)
        if load is None:
            raise ValueError("give load_weights, or construct the engine with a model that has it")
        return load


def update_of(update_info: Any, kind: str) -> UpdateInfo:
    """One of the dataclasses as what travels. Raises ValueError for another kind of update."""
    if update_info.update_kind != kind:
        other = "receive_weights" if kind == "sparse_flat" else "receive_sparse_weights"
        raise ValueError(f"the update is {update_info.update_kind!r}: {other} takes it")
    given = {k: v for k, v in vars(update_info).items() if v is not None}
    return msg.convert(given, UpdateInfo)


def args_of(kind: type[T], *given: Any, **named: Any) -> T:
    """A trainer's arguments: as that dataclass, as a dict (`trainer_args`), or one by one. Raises
    ValueError."""
    whole = given[0] if given else named.get("trainer_args")
    if len(given) + len(named) == 1 and isinstance(whole, kind):
        return whole
    if len(given) + len(named) == 1 and isinstance(whole, dict):
        given, named = (), whole
    try:
        return kind(*given, **named)
    except TypeError as exc:
        raise ValueError(f"Invalid trainer_args: {exc}") from exc
