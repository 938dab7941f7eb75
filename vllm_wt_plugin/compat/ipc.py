"""The `ipc` engine: tensors of a trainer on this host, over CUDA IPC or in shared memory."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from vllm_wt_plugin.compat import send
from vllm_wt_plugin.compat.engine import (
    ApplyPatches,
    Load,
    WeightTransferEngine,
    args_of,
    update_of,
)
from vllm_wt_plugin.compat.info import (
    IPCTrainerSendWeightsArgs,
    IPCWeightTransferInitInfo,
    IPCWeightTransferUpdateInfo,
)
from vllm_wt_plugin.sparse.patch import SparseWeightPatch, received
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.wire.sparse import patches


class IPCWeightTransferEngine(WeightTransferEngine):
    """Tensors are gone when a receive returns. Receiving raises ValueError, HandleError."""

    init_info_cls = IPCWeightTransferInitInfo
    update_info_cls = IPCWeightTransferUpdateInfo

    @cached_property
    def _importer(self) -> Importer:
        return Importer(getattr(self.device, "index", None))

    def init_transfer_engine(self, init_info: Any) -> None:
        """Nothing to do: an update brings all that is needed."""

    def receive_weights(self, update_info: Any, load_weights: Load | None = None) -> None:
        load, key = self._load(load_weights), secrets.token_hex(16)
        parts = update_of(update_info, "dense").registrations(key)
        with self._opened(msg.PreparePart("", key, (parts,)).own(0, self._importer.gpu)) as tensors:
            load(list(tensors.items()))

    def receive_sparse_weights(self, update_info: Any, apply_patches: ApplyPatches) -> None:
        push = patches(update_of(update_info, "sparse_flat"), secrets.token_hex(16))
        if push.register is not None:
            with self._opened(push.register) as tensors:
                apply_patches(received(push, tensors))

    @contextmanager
    def _opened(self, registration: Registration) -> Iterator[dict[str, torch.Tensor]]:
        tensors = self._importer.open(registration)
        try:
            self._importer.check_alive(registration.id)
            self._importer.wait(registration)
            yield tensors
            if torch.cuda.is_available():
                torch.cuda.synchronize(self._importer.device)
        finally:
            self._importer.close(registration.id)

    def shutdown(self) -> None:
        self._importer.close()

    @staticmethod
    def trainer_send_weights(
        iterator: Iterable[tuple[str, torch.Tensor]],
        trainer_args: IPCTrainerSendWeightsArgs | dict[str, Any],
    ) -> None:
        """Over HTTP or to Ray actors; see `send.send`."""
        send.send(iterator, args_of(IPCTrainerSendWeightsArgs, trainer_args))

    @staticmethod
    def trainer_send_sparse_weights(
        iterator: Iterable[SparseWeightPatch],
        trainer_args: IPCTrainerSendWeightsArgs | dict[str, Any],
    ) -> None:
        """The same for patches, each with its `full_shape`."""
        send.send_patches(iterator, args_of(IPCTrainerSendWeightsArgs, trainer_args))
