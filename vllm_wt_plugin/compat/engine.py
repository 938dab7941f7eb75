"""`WeightTransferEngine` and its backends, for programs that construct and drive one themselves.

An engine that vLLM makes is `worker/engine.py`; this one needs no vLLM: it opens what a trainer
sent and hands the tensors to `load_weights`.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch

from vllm_wt_plugin.compat import send
from vllm_wt_plugin.compat.info import (
    IPCTrainerSendWeightsArgs,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
)
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.update import UpdateInfo

Load = Callable[[list[tuple[str, torch.Tensor]]], object]


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
        """Receive one update's tensors and give them to `load_weights` (default: the model's)."""

    @abstractmethod
    def shutdown(self) -> None:
        """Let go of the trainer. Idempotent."""

    def _load(self, load_weights: Load | None) -> Load:
        load = load_weights or getattr(self.model, "load_weights", None)
        if load is None:
            raise ValueError("give load_weights, or construct the engine with a model that has it")
        return load


class IPCWeightTransferEngine(WeightTransferEngine):
    """Tensors of a trainer on this host: over CUDA IPC, or in shared memory on a CPU."""

    init_info_cls = IPCWeightTransferInitInfo
    update_info_cls = IPCWeightTransferUpdateInfo

    def __init__(
        self,
        config: Any,
        parallel_config: Any,
        device: Any = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        super().__init__(config, parallel_config, device, model)
        self._importer = Importer(getattr(self.device, "index", None))

    def init_transfer_engine(self, init_info: Any) -> None:
        """Nothing to do: an update brings all that is needed."""

    def receive_weights(self, update_info: Any, load_weights: Load | None = None) -> None:
        """Blocking; the tensors are gone when it returns. Raises ValueError, HandleError."""
        load, key = self._load(load_weights), secrets.token_hex(16)
        given = {k: v for k, v in vars(update_info).items() if v is not None}
        parts = msg.convert(given, UpdateInfo).registrations(key)
        registration = msg.PreparePart("", key, (parts,)).own(0, self._importer.gpu)
        tensors = self._importer.open(registration)
        try:
            self._importer.check_alive(key)
            self._importer.wait(registration)
            load(list(tensors.items()))
            if torch.cuda.is_available():
                torch.cuda.synchronize(self._importer.device)
        finally:
            self._importer.close(key)

    def shutdown(self) -> None:
        self._importer.close()

    @staticmethod
    def trainer_send_weights(
        iterator: Iterable[tuple[str, torch.Tensor]] | Iterator[tuple[str, torch.Tensor]],
        trainer_args: IPCTrainerSendWeightsArgs | dict[str, Any],
    ) -> None:
        """Send into the update that is open (`start_weight_update`); see `send.send`.

        Raises ValueError for arguments that do not fit.
        """
        if isinstance(trainer_args, dict):
            trainer_args = IPCTrainerSendWeightsArgs(**trainer_args)
        send.send(iterator, trainer_args)
