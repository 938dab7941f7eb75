"""The group of who speaks vLLM's own `nccl` protocol: its `PyNccl` between GPUs, gloo on CPU.

trainer: open_group (rank 0)  ⇢  worker: meet, the way vLLM's `nccl_common.py` does
"""

from __future__ import annotations

import base64
import binascii
import pickletools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import TCPStore

from vllm_wt_plugin.errors import RequestError, TransferError
from vllm_wt_plugin.transport.backends import Member, Passed, first_line, told
from vllm_wt_plugin.transport.group import Communicator, Patience, connect, join, listen
from vllm_wt_plugin.wire.nccl import NcclInit

ID_BYTES = 128
ID_KEY = "broadcast_from/0/0"  # of `StatelessProcessGroup.broadcast_obj`
UNNAMED = "0" * 32  # the group of a payload that names none
# unique id, rank, world size, device → `PyNcclCommunicator`
Make = Callable[[bytes, int, int, torch.device], Any]
Load = Callable[[], Make]  # raises where NCCL cannot be used


def meet(
    init: NcclInit, rank: int, device: torch.device, stop: threading.Event, load: Load
) -> Communicator:
    """Join the group of `init`, as another rank than 0. Blocking, at most `rendezvous_s`, less if
    `stop` is set; beyond that only NCCL's own connecting. Raises RequestError, NotJoined,
    TransferError, and what `load` raises."""
    at = Member(
        host=init.master_address or "", port=init.master_port or 0, group=init.group or UNNAMED,
        rank=rank, world_size=init.world_size,
    )  # fmt: skip
    if init.communicator == "torch" or device.type == "cpu":
        if not at.port:
            raise RequestError(
                "an NCCL id is for engines on GPUs", where="$.init_info.nccl_unique_id_b64",
                next_step="send `master_address` and `master_port`",
            )  # fmt: skip
        return join(at, device, init.rendezvous_s, stop)
    make = load()  # before anything is waited for
    store, unique_id = None, given(init.nccl_unique_id_b64)
    if unique_id is None:
        store, unique_id = _ask(at, Patience(at, init.rendezvous_s, stop))
    with told(f"group rank {rank}"):
        return PyNccl(make(unique_id, rank, init.world_size, device), store)


def open_group(host: str, port: int, world_size: int, timeout_s: float) -> Communicator:
    """The trainer's end on a machine without GPUs: rank 0, once all others have come. Blocking.
    Raises RequestError for an address that cannot be had, NotJoined."""
    store = listen(host, port)
    at = Member(host=host, port=store.port, group=UNNAMED, rank=0, world_size=world_size)
    return join(at, torch.device("cpu"), timeout_s, threading.Event(), store)


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


def _ask(at: Member, wait: Patience) -> tuple[TCPStore, bytes]:
    """The trainer's store, and the id that it puts there."""
    store = connect(at, wait, counted=True)
    with told(f"group rank {at.rank}"):
        wait(
            lambda: store.check([ID_KEY]),
            lambda: f"the trainer at {at.host}:{at.port} sent no NCCL id",
            "look at the trainer's side: vLLM's PyNccl turns itself off, in silence, where the "
            "NCCL it loads is older than it asks for, and then broadcasts nothing; set "
            "VLLM_NCCL_SO_PATH to a newer one",
        )
        return store, read_id(store.get(ID_KEY))


def read_id(pickled: bytes) -> bytes:
    """The bytes of an `ncclUniqueId` that vLLM pickled; nothing is unpickled here."""
    try:
        for _, value, _ in pickletools.genops(pickled):
            if isinstance(value, bytes) and len(value) == ID_BYTES:
                return value
    except ValueError:
        pass  # no pickle at all
    raise TransferError("what the trainer put into its store is no NCCL id")


class PyNccl:
    """A `Communicator` on vLLM's `PyNcclCommunicator`. Raises TransferError for one that vLLM
    has turned off: it would broadcast nothing, and say nothing."""

    def __init__(self, made: Any, store: TCPStore | None = None) -> None:
        if made.disabled:
            raise TransferError(
                "vLLM's PyNccl is off in this process",
                next_step="unset VLLM_DISABLE_PYNCCL; set VLLM_NCCL_SO_PATH to an NCCL as new as "
                "vLLM asks for",
            )
        self.rank, self.world_size, self.aborted = made.rank, made.world_size, ""
        self._made, self._store = made, store
        self._lock = threading.Lock()

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> Passed:
        if self.aborted:
            raise TransferError(self.aborted)
        try:
            self._made.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
        except RuntimeError as exc:
            raise TransferError(first_line(exc), where=f"group rank {self.rank}") from exc
        return Passed()

    def abort(self, reason: str) -> None:
        with self._lock:
            if not self.aborted:
                self.aborted = reason
                self._made.destroy()  # by ncclCommAbort: what waits on the GPU ends

    def close(self) -> None:
        self.abort("the group is closed")
        self._store = None
