"""torch's gloo and NCCL, each made so that it can be aborted and never ends the process."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from vllm_wt_plugin.errors import TransferError

_sockets = threading.Lock()  # while the sockets that gloo opens are told from others


class Pending(Protocol):
    """A broadcast under way."""

    def done(self) -> bool:
        """Whether it has ended. Raises TransferError if it failed. Does not block."""

    def order(self) -> bool:
        """Have the current stream come after it. False where there are no streams: only a thread
        can wait then, for `done`."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """One process of a group, and where they all meet. `group` is random: no other trainer's
    store answers to it."""

    host: str
    port: int
    group: str
    rank: int
    world_size: int


class Gloo:
    """Torch cannot abort gloo: it waits until its sockets close. So they are shut down here.

    That ends what has not begun to move; gloo wakes nobody whose bytes are halfway (`tx_`, `rx_`
    in its `transport/tcp/pair.cc`). Such a thread of gloo's stays until its own `timeout`.
    """

    def __init__(self, at: Member) -> None:
        self._at = at
        with _sockets:
            before = set(_listening())
            self._device = dist.ProcessGroupGloo.create_device(hostname=_own_address(at))
            port = next((p for p in _listening() if p not in before), 0)
        self.port = str(port)
        self._ports: set[int] = set()

    def connect(self, keys: Store, timeout_s: float) -> Any:
        others = [r for r in range(self._at.world_size) if r != self._at.rank]
        self._ports = {int(keys.get(f"here/{r}")) for r in others}
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [self._device]
        options._timeout = timedelta(seconds=timeout_s)
        options._threads = 2
        store = PrefixStore("gloo", keys)
        return dist.ProcessGroupGloo(store, self._at.rank, self._at.world_size, options)

    @staticmethod
    def timeout(timeout_s: float) -> timedelta:
        """Of one broadcast, a little later than that of whoever waits for it, who says more."""
        return timedelta(seconds=max(timeout_s, 0.0) + 1)

    def pending(self, work: Any) -> Pending:
        return _GlooWork(work)

    def abort(self, made: Any) -> None:
        for s in _open_sockets():
            with contextlib.suppress(OSError):
                ours = s.getsockname()[1] == int(self.port) or s.getpeername()[1] in self._ports
                if ours and not _listens(s):
                    s.shutdown(socket.SHUT_RDWR)


class _GlooWork:
    def __init__(self, work: Any) -> None:
        self._work = work

    def done(self) -> bool:
        if not self._work.is_completed():
            return False
        with told(""):
            self._work.wait()
        return True

    def order(self) -> bool:
        return False


class Nccl:
    """ProcessGroupNCCL without its watchdog's way to handle errors, which ends the process."""

    port = ""

    def __init__(self, at: Member) -> None:
        self._at = at

    def connect(self, keys: Store, timeout_s: float) -> Any:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=1)
        quiet = dict.fromkeys(
            ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_BLOCKING_WAIT",
             "TORCH_NCCL_ENABLE_MONITORING"), "0",
        )  # fmt: skip
        before = {k: os.environ.get(k) for k in quiet}
        os.environ.update(quiet)  # read by the constructor
        self._arrived = torch.cuda.Stream()
        try:
            return dist.ProcessGroupNCCL(
                PrefixStore("nccl", keys), self._at.rank, self._at.world_size, options
            )
        finally:
            for k, v in before.items():
                os.environ.pop(k) if v is None else os.environ.update({k: v})

    @staticmethod
    def timeout(timeout_s: float) -> timedelta:
        """The watchdog's, which would end the process; an abort ends everything under way."""
        return timedelta(days=1)

    def pending(self, work: Any) -> Pending:
        with torch.cuda.stream(self._arrived):
            return _NcclWork(work)

    def abort(self, made: Any) -> None:
        made.abort()


class Passed:
    """Ended when the GPU has passed what its stream has been given so far."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def done(self) -> bool:
        return bool(self._event.query())

    def order(self) -> bool:
        torch.cuda.current_stream().wait_event(self._event)
        return True


class _NcclWork(Passed):
    """With an error that NCCL noticed, the GPU never gets there.

    Made on a stream of its own: on the one that starts broadcasts the next would begin only once
    this one's end has gone from stream to stream, instead of right behind it."""

    GRACE_S = 1.0

    def __init__(self, work: Any) -> None:
        self._work = work
        work.wait()  # makes the current stream wait, not this thread
        super().__init__()
        self._ended = 0.0

    def done(self) -> bool:
        if super().done():
            return True
        if self._work.is_completed():
            self._ended = self._ended or time.monotonic()
            if time.monotonic() - self._ended > self.GRACE_S:
                raise TransferError("NCCL reports that a peer has failed")
        return False


def _own_address(at: Member) -> str:
    """The address of this machine under which the others reach it."""
    family = socket.getaddrinfo(at.host, at.port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect((at.host, at.port))
        address: str = s.getsockname()[0]
        return address


def _open_sockets() -> Iterator[socket.socket]:
    """This process's TCP sockets, each as a duplicate that is closed again."""
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                continue
            copy = os.dup(fd)
        except OSError:  # closed meanwhile
            continue
        try:
            s = socket.socket(fileno=copy)
        except OSError:  # and opened as something else
            os.close(copy)
            continue
        with s:
            if s.family in (socket.AF_INET, socket.AF_INET6) and s.type == socket.SOCK_STREAM:
                yield s


def _listens(s: socket.socket) -> bool:
    return bool(s.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _listening() -> list[int]:
    return [s.getsockname()[1] for s in _open_sockets() if _listens(s)]


@contextlib.contextmanager
def told(where: str) -> Iterator[None]:
    """torch's errors as ours."""
    try:
        yield
    except RuntimeError as exc:
        raise TransferError(first_line(exc), where=where) from exc


def first_line(exc: Exception) -> str:
    """Without the C++ source position and the advice that gloo adds."""
    line = (str(exc).splitlines() or [type(exc).__name__])[0]
    return re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\] ", "", line).split(" This is typically")[0]
