"""The group of vLLM's own trainers: its `PyNccl`, met the way its `nccl_common.py` does."""

from __future__ import annotations

import base64
import binascii
import pickletools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from vllm_wt_plugin.errors import NotJoined, RequestError, TransferError
from vllm_wt_plugin.transport.backends import first_line
from vllm_wt_plugin.wire.nccl import NcclInit

ID_BYTES = 128
ID_KEY = "broadcast_from/0/0"  # of `StatelessProcessGroup.broadcast_obj`
# unique id, rank, world size, device → `PyNcclCommunicator`
Make = Callable[[bytes, int, int, torch.device], Any]


def meet(
    make: Make, init: NcclInit, rank: int, device: torch.device, stop: threading.Event
) -> PyNccl:
    """Join the group of `init`. Blocking, and without a way to end it before its store's timeout:
    vLLM's trainers wait in the same way. Raises RequestError, TransferError, NotJoined."""
    if device.type != "cuda":
        raise RequestError(
            "vLLM's own nccl trainers need engines on GPUs",
            next_step='push with WeightSync(url, backend="nccl"), which uses gloo on CPU',
        )
    store, unique_id = None, given(init.nccl_unique_id_b64)
    if unique_id is None:
        store = _store(init)
        unique_id = read_id(store.get(ID_KEY))
    try:
        return PyNccl(make(unique_id, rank, init.world_size, device), rank, init.world_size, store)
    except RuntimeError as exc:
        raise TransferError(first_line(exc), where=f"group rank {rank}") from exc


def given(text: str | None) -> bytes | None:
    """The id that a trainer without torch sends along."""
    if text is None:
        return None
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        data = b""
    if len(data) != ID_BYTES:
        raise RequestError(
            f"the id is not {ID_BYTES} bytes in standard base64",
            where="$.init_info.nccl_unique_id_b64",
        )
    return data


def read_id(pickled: bytes) -> bytes:
    """The bytes of an `ncclUniqueId` that vLLM pickled; nothing is unpickled here."""
    try:
        for _, value, _ in pickletools.genops(pickled):
            if isinstance(value, bytes) and len(value) == ID_BYTES:
                return value
    except ValueError:
        pass  # no pickle at all
    raise TransferError("what the trainer put into its store is no NCCL id")


def _store(init: NcclInit) -> TCPStore:
    address, port = init.master_address or "", init.master_port or 0
    try:  # arguments as vLLM's: who counts the members must count this one
        return TCPStore(
            address, port, init.world_size, False,
            timeout=timedelta(seconds=init.rendezvous_s), use_libuv=False,
        )  # fmt: skip
    except RuntimeError as exc:
        raise NotJoined(
            f"no group at {address}:{port} within {init.rendezvous_s:g} s: {first_line(exc)}",
            next_step="start the trainer's end at the same time",
        ) from exc


class PyNccl:
    """A `Communicator` on vLLM's `PyNcclCommunicator`."""

    def __init__(self, made: Any, rank: int, world_size: int, store: TCPStore | None) -> None:
        self.rank, self.world_size, self.aborted = rank, world_size, ""
        self._made, self._store = made, store
        self._lock = threading.Lock()

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> _Passed:
        if self.aborted:
            raise TransferError(self.aborted)
        self._made.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
        return _Passed()

    def abort(self, reason: str) -> None:
        with self._lock:
            if not self.aborted:
                self.aborted = reason
                self._made.destroy()  # by ncclCommAbort: what waits on the GPU ends

    def close(self) -> None:
        self.abort("the group is closed")
        self._store = None


class _Passed:
    """Whether the current stream has got here."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def done(self) -> bool:
        return bool(self._event.query())
