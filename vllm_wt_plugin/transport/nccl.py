"""Bytes from one sender to many receivers, bucket by bucket through two buffers on either side.

    Sender.buffer → (fill) → Sender.send … drain      ⇢      Receiver.next → (copy) → release …

What a bucket holds is not known here: both sides know its size, from the same specs
(`wire/buckets.py`), and the same number of buckets. While one is copied, the next one travels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from functools import cache

import torch

from vllm_wt_plugin.errors import TransferError
from vllm_wt_plugin.transport.backends import Pending
from vllm_wt_plugin.transport.group import Communicator, run

BUFFERS = 2
JOIN_S = 10.0  # how long a thread may take to notice that its group was aborted


def buffers(nbytes: int, device: torch.device) -> list[torch.Tensor]:
    """What a Sender or a Receiver works with: uint8, on `device`."""
    return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]


class Sender:
    """Rank 0's end of one transfer, on one thread. Raises TransferError, from any method, where
    a bucket has not reached every rank by the deadline, or the group was aborted. `buckets`: how
    many there will be, 0 if that is not known.

    On CUDA, filling and sending are ordered by the current stream.
    """

    def __init__(
        self, group: Communicator, memory: Sequence[torch.Tensor], buckets: int, timeout_s: float
    ) -> None:
        self._group, self._memory, self._buckets = group, memory, buckets
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._pending: deque[Pending] = deque()
        self._begun = 0

    @property
    def arrived(self) -> int:
        """Buckets that every rank has."""
        return self._begun - len(self._pending)

    def buffer(self) -> torch.Tensor:
        """Where to put the next bucket; waits until the one that was there has arrived."""
        while len(self._pending) >= len(self._memory):
            self._oldest()
        return self._memory[self._begun % len(self._memory)]

    def send(self, nbytes: int) -> None:
        """Broadcast the first bytes of `buffer()`; does not wait."""
        data = self._memory[self._begun % len(self._memory)][:nbytes]
        self._pending.append(self._group.broadcast(data, self._deadline - time.monotonic()))
        self._begun += 1

    def drain(self) -> None:
        """Wait until every bucket has arrived."""
        while self._pending:
            self._oldest()

    def _oldest(self) -> None:
        what = f"bucket {self.arrived + 1}" + f" of {self._buckets}" * bool(self._buckets)
        pause = _Pause()
        while not _done(self._pending[0], self._group, what):
            if time.monotonic() > self._deadline:
                error = f"{what} was not taken by every rank within {self._timeout_s:g} s"
                self._group.abort(error)
                raise TransferError(error, where=f"rank 0 of {self._group.world_size}")
            pause()
        self._pending.popleft()


class Receiver:
    """Another rank's end: a thread of its own receives; the methods are for the thread that copies.

    `memory[i % len(memory)]` takes bucket i, of `sizes[i]` bytes. On CUDA the copies are ordered
    by the current stream of whoever calls `release`.
    """

    def __init__(
        self,
        group: Communicator,
        memory: Sequence[torch.Tensor],
        sizes: Sequence[int],
        timeout_s: float,
    ) -> None:
        self._group, self._memory, self._sizes = group, memory, sizes
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._ready: deque[int] = deque()
        self._free: deque[torch.cuda.Event | None] = deque([None] * len(memory))
        self._changed = threading.Condition()
        self._error: TransferError | None = None
        self.arrived = 0  # buckets
        self._thread = run(self._run, "receive", lambda: group.abort("the process ends"))

    def next(self, wait_s: float) -> int | None:
        """The next bucket, once it is here; None if it is not within `wait_s`. Raises what the
        transfer failed with, naming the bucket."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._error, wait_s)
            if self._ready:
                return self._ready.popleft()
            if self._error is not None:
                raise self._error
            return None

    def release(self) -> None:
        """The bucket that `next` gave has been copied, or will be by the current stream."""
        event = None
        if self._memory[0].is_cuda:
            event = torch.cuda.Event()
            event.record()
        with self._changed:
            self._free.append(event)
            self._changed.notify_all()

    def abort(self, reason: str) -> None:
        """End the transfer and its group, wait for the thread. Idempotent.

        Raises TransferError if the thread does not end; its group cannot be closed then."""
        self._group.abort(reason)
        with self._changed:
            self._changed.notify_all()
        if wait([self._thread], JOIN_S).not_done:
            raise TransferError(f"the receive did not end within {JOIN_S:g} s of its abort")

    def _run(self) -> None:
        try:
            with on_side_stream(self._memory[0].device):
                self._receive()
        # Nobody is here to see it; `next` raises it in the thread that waits.
        except Exception as exc:
            what = f"bucket {self.arrived + 1} of {len(self._sizes)} did not arrive: "
            told = exc.what if isinstance(exc, TransferError) else f"{type(exc).__name__}: {exc}"
            self._group.abort(what + told)
            with self._changed:
                self._error = TransferError(what + told, where=f"group rank {self._group.rank}")
                self._changed.notify_all()

    def _receive(self) -> None:
        pending: deque[Pending] = deque()
        begun, pause = 0, _Pause()
        while self.arrived < len(self._sizes):
            if begun < len(self._sizes) and self._free:
                with self._changed:
                    event = self._free.popleft()
                if event is not None:
                    torch.cuda.current_stream().wait_event(event)
                data = self._memory[begun % len(self._memory)][: self._sizes[begun]]
                left = self._deadline - time.monotonic()
                pending.append(self._group.broadcast(data, left))
                begun += 1
            elif pending and _done(pending[0], self._group, ""):
                pending.popleft()
                with self._changed:
                    self._ready.append(self.arrived)
                    self.arrived += 1
                    self._changed.notify_all()
                pause = _Pause()
            elif time.monotonic() > self._deadline:
                raise TransferError(f"nothing came from rank 0 within {self._timeout_s:g} s")
            elif self._group.aborted:
                raise TransferError(self._group.aborted)
            else:
                pause()


class _Pause:
    """Sleeps that begin short: a bucket over NVLink takes a millisecond."""

    def __init__(self) -> None:
        self._s = 2e-5

    def __call__(self) -> None:
        time.sleep(self._s)
        self._s = min(self._s * 1.3, 1e-3)


def _done(pending: Pending, group: Communicator, what: str) -> bool:
    """`pending.done()`; of a group that was aborted, why."""
    try:
        if pending.done() and not group.aborted:
            return True
    except TransferError as exc:
        why = group.aborted or exc.what
        group.abort(why)
        raise TransferError(f"{what}: {why}".strip(": "), where=f"rank {group.rank}") from exc
    if group.aborted:
        raise TransferError(f"{what}: {group.aborted}".strip(": "), where=f"rank {group.rank}")
    return False


@cache  # memory that a stream has used stays with it
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Of this thread; None without CUDA."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def on_side_stream(device: torch.device, after: torch.cuda.Stream | None = None) -> Iterator[None]:
    """A thread's work on a stream beside the others', after what `after` has been given. A new
    thread knows neither the device nor the streams of the one that starts it."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(device)):
        if after is not None:
            torch.cuda.current_stream().wait_stream(after)
        yield
