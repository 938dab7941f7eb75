"""This worker's place in a trainer's group: joining it, and receiving from it, on threads.

The verbs that start either return at once and are followed by others that look how it goes, so
that status, lease and abort never wait for a network.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import msgspec
import torch

from vllm_wt_plugin.errors import NoUpdate, UnknownRegistration, UnsupportedVLLM
from vllm_wt_plugin.transport.group import Communicator, Group, Joining
from vllm_wt_plugin.transport.nccl import Receiver
from vllm_wt_plugin.transport.pynccl import Load, Make, meet
from vllm_wt_plugin.wire.buckets import Geometry
from vllm_wt_plugin.wire.messages import Announce, Announcement
from vllm_wt_plugin.wire.nccl import NcclInit
from vllm_wt_plugin.wire.params import ParamSpec

WAIT_S = 0.1  # for which one verb keeps the worker: others queue behind it


def _no_pynccl() -> Make:
    raise UnsupportedVLLM("this engine has no PyNccl")


class Link:
    """At most one group at a time; the last trainer to ask has it. Main thread only.

    Whatever fails or is aborted ends the group: the trainer makes a new one.
    """

    def __init__(
        self,
        rank: int,
        device: torch.device,
        pynccl: Load = _no_pynccl,
        shared_env: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._rank, self._device, self._pynccl = rank, device, pynccl
        self._shared_env = shared_env  # active while a group with other processes is made
        self.init: NcclInit | None = None
        self._joining: Joining | None = None
        self._group: Communicator | None = None
        self._receiver: Receiver | None = None

    def join(self, init: NcclInit) -> None:
        """Begin to join the group of `init`, and leave any other. Raises RequestError."""
        rank = init.check(self._rank)
        self.leave("another trainer's group takes its place")
        self.init = init
        self._joining = Joining(lambda stop: self._meet(init, rank, stop))

    def _meet(self, init: NcclInit, rank: int, stop: threading.Event) -> Communicator:
        with self._shared_env():
            return meet(init, rank, self._device, stop, self._pynccl)

    def joined(self) -> bool:
        """Whether this rank is in the group, after a moment's wait. Raises TransferError."""
        if self._joining is not None:
            try:
                self._group = self._joining.wait(WAIT_S)
            except BaseException:
                self._joining = None
                raise
            if self._group is None:
                return False
            self._joining = None
        if self._group is None:
            raise NoUpdate("no group is being joined", next_step="init the transfer engine")
        return True

    def expect(self, group: str | None) -> None:
        """Raises UnknownRegistration unless this worker is in that group, and it is whole."""
        mine = None if self.init is None else self.init.group
        if self._group is None or self._group.aborted or group != mine:
            raise UnknownRegistration(
                "the worker is not in this trainer's group",
                next_step="init the transfer engine again",
            )

    def announcement(
        self, specs: tuple[ParamSpec, ...], packed: bool, buffer_bytes: int | None
    ) -> Announce:
        """What vLLM's trainers leave unsaid of these tensors; the same for the same."""
        init = self.init
        if init is None:
            raise NoUpdate("no group was joined", next_step="init the transfer engine")
        geometry: Geometry = "vllm" if packed or init.packed else "apart"
        nbytes = buffer_bytes or init.packed_buffer_size_bytes
        made = Announcement("0" * 32, specs, nbytes, geometry=geometry)
        key = hashlib.blake2b(msgspec.msgpack.encode(made), digest_size=16).hexdigest()
        return Announce("", key, msgspec.structs.replace(made, id=key))

    def receive(
        self, memory: Sequence[torch.Tensor], sizes: Sequence[int], *, together: bool = False
    ) -> None:
        """Begin to take buckets of these sizes, each into the next of `memory`, in turn;
        `together`: once every rank of the group has begun."""
        self.expect(None if self.init is None else self.init.group)
        if self._group is None or self.init is None or self._receiver is not None:
            raise NoUpdate("the buckets of this update are being received already")
        barrier = self._group.barrier if together and isinstance(self._group, Group) else None
        self._receiver = Receiver(self._group, memory, sizes, self.init.timeout_s, barrier=barrier)

    def next(self, wait_s: float, *, ahead: bool) -> int | None:
        """The next bucket that is here, or `ahead` of it; None if there is none within `wait_s`."""
        return self._receiving.next(wait_s, ahead=ahead)

    def complete(self, wait_s: float) -> bool:
        """Whether every bucket is here, after a moment's wait; this rank's may be `done`."""
        return self._receiver is None or self._receiver.complete(wait_s)

    @property
    def _receiving(self) -> Receiver:
        if self._receiver is None:
            raise NoUpdate("nothing is being received", next_step="start the update again")
        return self._receiver

    def release(self) -> None:
        """The current stream has been told to copy the bucket that `next` gave."""
        self._receiving.release()

    @property
    def arrived(self) -> int:
        """Buckets of the transfer under way that are here."""
        return 0 if self._receiver is None else self._receiver.arrived

    def done(self) -> None:
        """Every bucket was copied: the group waits for the next transfer."""
        self._receiver = None

    def stop(self, reason: str) -> None:
        """End a transfer under way, and with it the group. Idempotent."""
        if self._receiver is not None:
            self.leave(reason)

    def leave(self, reason: str) -> None:
        """Leave the group, or stop joining one. Idempotent."""
        receiver, self._receiver = self._receiver, None
        joining, self._joining = self._joining, None
        group, self._group = self._group, None
        self.init = None
        if joining is not None:
            joining.abort()
        if receiver is not None:
            receiver.abort(reason)  # raises where its thread hangs: the group must live then
        if group is not None:
            group.close()
