"""In process: the trainer's storages in a table, the worker's views straight into them."""

from __future__ import annotations

import os
import secrets
import weakref
from functools import partial

import torch

from vllm_wt_plugin.errors import HandleError
from vllm_wt_plugin.transport.layout import BaseExporter, Export, Mapped, Span
from vllm_wt_plugin.wire.handles import LocalStorage

_table: dict[str, torch.UntypedStorage] = {}


class LocalExport:
    """One storage in this process's table, under a random 128-bit key."""

    start = 0

    def __init__(self, storage: torch.UntypedStorage) -> None:
        key = secrets.token_hex(16)
        self.handle = LocalStorage(os.getpid(), key, storage.nbytes())
        self._address = storage.data_ptr()
        _table[key] = storage
        self._finalizer = weakref.finalize(self, _table.pop, key, None)

    def rebind(self, storage: torch.UntypedStorage) -> bool:
        """False when the storage in the table was resized: readers hold that one."""
        held = _table[self.handle.key]
        return (held.data_ptr(), held.nbytes()) == (self._address, self.handle.nbytes)

    def refresh(self) -> None:
        """Nothing to do: the worker reads the trainer's own memory."""

    def close(self) -> None:
        self._finalizer()


class MemoryExporter(BaseExporter):
    """Shares tensors of any device with an `Importer` of the same process, without a copy.

    A CUDA reader is ordered after the trainer only if both use the same stream.
    """

    def _export(self, storage: torch.UntypedStorage, span: Span) -> Export:
        return LocalExport(storage)


def attach(handle: LocalStorage, name: str) -> Mapped:
    """Worker side: the storage itself. HandleError for another process or an unknown key."""
    return Mapped(_find(handle, name), 0, partial(_find, handle, name))


def _find(handle: LocalStorage, name: str) -> torch.UntypedStorage:
    if handle.pid != os.getpid():
        raise HandleError(
            f"the memory is in process {handle.pid}, this is process {os.getpid()}",
            where=name,
            next_step="use the ipc or nccl transport between processes",
        )
    storage = _table.get(handle.key)
    if storage is None:
        raise HandleError(
            "the memory is gone: no exporter of this process holds it",
            where=name,
            next_step="register the tensors again",
        )
    if storage.nbytes() < handle.nbytes:
        raise HandleError(
            f"the memory has {storage.nbytes()} bytes, its handle claims {handle.nbytes}",
            where=name,
            next_step="register the tensors again",
        )
    return storage
