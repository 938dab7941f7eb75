"""CUDA storages through CUDA IPC: no bytes are copied, the worker reads the trainer's memory.

Nothing here touches CUDA at import. Lifetimes are the exporter's: it holds a reference to each
storage and torch's own count on its memory until `close`. While an export lives no address is
reused and no memory freed, not even by `resize_`. The worker never touches torch's count:
several workers import one handle, and each would take one off.
"""

from __future__ import annotations

import ctypes
import os
import stat
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch

from vllm_wt_plugin.errors import HandleError, RequestError, TransferError
from vllm_wt_plugin.transport.layout import Mapped, Span
from vllm_wt_plugin.wire.handles import CudaStorage, Storage, TorchExport
from vllm_wt_plugin.wire.torch_handles import IPC_HANDLE_BYTES, bare_handle

POLL_S = 50e-6
COUNTER_BYTES = 80_000  # the least a file of torch's reference counters has: 10,000 of int64
# Handed to torch instead of a counter's name. On release torch opens that shared-memory file and
# decrements in it, and takes a failure for a trainer that has ended. An inner slash always fails.
_NO_COUNTER = b"/wt/none"


def gpu_uuid(device: int) -> str:
    """The UUID of a visible device: the same in every process, whatever is visible to it."""
    return str(torch.cuda.get_device_properties(device).uuid)


class CudaExport:
    """Trainer side: one CUDA storage, exported once and held until `close`."""

    start = 0

    def __init__(self, storage: torch.UntypedStorage, span: Span) -> None:
        try:
            shared = storage._share_cuda_()
        except RuntimeError as exc:
            raise _not_exportable(_line(exc), span.name) from exc
        device, handle, nbytes, offset, counter, slot, _, _ = shared
        self.torch_handle: tuple[Any, ...] = shared  # as `_new_shared_cuda` takes it
        self._finalizer = weakref.finalize(self, _release, counter, slot)
        self._finalizer.atexit = False  # the process's end frees more than this could
        self._storage = storage
        self._address = storage.data_ptr()
        self.handle = CudaStorage(
            gpu_uuid=gpu_uuid(device),
            handle=bare_handle(handle, span.name),
            nbytes=nbytes,
            offset_bytes=offset,
        )

    def rebind(self, storage: torch.UntypedStorage) -> bool:
        """False when the exported storage was resized, so that its memory is elsewhere."""
        return self._storage.data_ptr() == self._address == storage.data_ptr()

    def refresh(self) -> None:
        """Nothing to do: the worker reads the trainer's own memory, ordered by `Fence`."""

    def close(self) -> None:
        self._finalizer()
        self._storage = torch.empty(0, dtype=torch.uint8).untyped_storage()


def _release(counter: bytes, slot: int) -> None:
    """Give up torch's count, and the memory if a `resize_` left it to that count alone."""
    torch.UntypedStorage._release_ipc_counter_cuda(counter, slot)
    torch.cuda.ipc_collect()


def _line(exc: RuntimeError) -> str:
    return str(exc).partition("\n")[0]


def _not_exportable(why: str, name: str) -> RequestError:
    return RequestError(
        f"CUDA cannot share this parameter's memory: {why}",
        where=name,
        next_step="allocate it with cudaMalloc (no expandable_segments, no sleep-mode pool, not "
        "itself received over IPC), or use the nccl backend",
    )


def release(export: TorchExport) -> None:
    """Worker side: tell the trainer's torch that its memory is not used any more.

    torch opens the file that the handle names and subtracts one in it, so the file is checked
    first. One that is gone belonged to a trainer that has ended.
    """
    try:
        found = (Path("/dev/shm") / export.counter.lstrip("/")).lstat()  # noqa: S108
    except OSError:
        return
    ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    if ours and found.st_size >= COUNTER_BYTES:
        torch.UntypedStorage._release_ipc_counter_cuda(export.counter.encode(), export.slot)


class Fence:
    """Trainer side: the interprocess event that says up to where the worker may read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._event = torch.cuda.Event(interprocess=True)
        self.record()
        self.gpu_uuid = gpu_uuid(device.index)
        self.handle: bytes = self._event.ipc_handle()

    def record(self) -> None:
        """Everything on the device's current stream so far comes before the worker's reads."""
        self._event.record(torch.cuda.current_stream(self.device))


def open_event(handle: bytes, device: int, uuid: str) -> torch.cuda.Event:
    """Worker side: the trainer's `Fence`, seen from `device`; the GPUs may differ."""
    if len(handle) != IPC_HANDLE_BYTES:
        raise HandleError(f"the event handle has {len(handle)} bytes", where=f"GPU {uuid}")
    from_ipc_handle: Any = torch.cuda.Event.from_ipc_handle
    try:
        return cast(torch.cuda.Event, from_ipc_handle(torch.device("cuda", device), handle))
    except RuntimeError as exc:
        raise _not_importable(_line(exc), "the event", uuid, device) from exc


def wait(event: Any, seconds: float) -> None:
    """Worker side: block until the event's last record is reached, or raise TransferError.

    A poll and no stream wait: the event of a trainer that was killed before it fired never
    fires, and a stream that waits for it is stuck until this process ends (seen on an H200).
    """
    end = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            raise TransferError(
                f"the trainer's GPU did not reach the end of its last write within {seconds:g} s",
                next_step="see whether the trainer is alive; push when its step is done",
            )
        time.sleep(POLL_S)


class Allocations:
    """Worker side: the trainer's allocations behind some storages, each mapped once for `device`.

    One allocation holds many storages; they share its mapping and keep it alive. The memory may
    be a peer GPU's, which need not be visible here; nothing is allocated on that one.
    """

    def __init__(self, storages: Iterable[Storage]) -> None:
        self._stop: dict[bytes, int] = {}  # handle → one past the last byte in use
        self._memory: dict[bytes, torch.UntypedStorage] = {}
        for storage in storages:
            if isinstance(storage, CudaStorage):
                stop = storage.offset_bytes + storage.nbytes
                self._stop[storage.handle] = max(stop, self._stop.get(storage.handle, 0))

    def attach(self, handle: CudaStorage, device: int, name: str) -> Mapped:
        """Raises HandleError for memory that this device cannot reach, a stale handle, or a
        range beyond the allocation.
        """
        if len(handle.handle) != IPC_HANDLE_BYTES:
            raise HandleError(f"the memory handle has {len(handle.handle)} bytes", where=name)
        if handle.handle not in self._memory:
            memory = _map(handle, self._stop[handle.handle], device, name)
            self._memory[handle.handle] = memory
        # Nothing to check later: a mapping outlives its trainer.
        return Mapped(self._memory[handle.handle], handle.offset_bytes, lambda: None)

    def sizes(self) -> dict[bytes, int]:
        """Bytes of each that is mapped, by handle."""
        return {handle: memory.nbytes() for handle, memory in self._memory.items()}


def _map(handle: CudaStorage, stop: int, device: int, name: str) -> torch.UntypedStorage:
    """The allocation's bytes [0, stop): from its base, so that the range can be checked."""
    _check_peer(handle.gpu_uuid, device, name)
    try:
        memory = torch.UntypedStorage._new_shared_cuda(
            device, handle.handle, stop, 0, _NO_COUNTER, 0, b"", False
        )
    except RuntimeError as exc:
        raise _not_importable(_line(exc), name, handle.gpu_uuid, device) from exc
    base, size = _allocation(memory.data_ptr(), device, name)
    if memory.data_ptr() != base or stop > size:
        raise HandleError(
            f"the handle claims {stop} bytes of an allocation of {size}",
            where=name,
            next_step="send the registration that the exporter made",
        )
    return memory


def _check_peer(uuid: str, device: int, name: str) -> None:
    """Refuse a visible GPU without peer access; one that is not visible is found out on opening."""
    for other in range(torch.cuda.device_count()):
        peer = other != device and gpu_uuid(other) == uuid
        if peer and not torch.cuda.can_device_access_peer(device, other):
            raise _not_importable("no peer access", name, uuid, device)


def _not_importable(why: str, where: str, uuid: str, device: int) -> HandleError:
    return HandleError(
        f"memory of GPU {uuid} cannot be read from GPU {gpu_uuid(device)}: {why}",
        where=where,
        next_step="register the tensors again if the trainer restarted (it must be another process "
        "on this host); without peer access between the GPUs use the nccl backend",
    )


def _allocation(address: int, device: int, name: str) -> tuple[int, int]:
    """Base address and bytes of the allocation around `address`; torch has no call for it."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    with torch.cuda.device(device):
        code = ctypes.CDLL("libcuda.so.1").cuMemGetAddressRange_v2(
            ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)
        )
    if code != 0:
        raise HandleError(f"CUDA knows no such memory (driver error {code})", where=name)
    return base.value, size.value
