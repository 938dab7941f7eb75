"""Bytes from one sender to many receivers, bucket by bucket through two buffers on either side.

    Sender.buffer → (fill) → Sender.send … drain      ⇢      Receiver.next → (copy) → release …

What a bucket holds is not known here: both sides know its size, from the same specs
(`wire/buckets.py`), and the same number of buckets. While one is copied, the next one travels.
On CUDA buckets are handed on by events: fills, broadcasts and copies are given to their streams
ahead of time, and threads only watch the deadline. Where there are no streams, threads wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from functools import cache

import torch

from vllm_wt_plugin.errors import TransferError
from vllm_wt_plugin.transport.backends import Pending
from vllm_wt_plugin.transport.group import Communicator, run

Barrier = Callable[[float], Pending]  # of a group, within so many seconds

BUFFERS = 2
AHEAD = 16  # buckets on their way: a full queue of launches would stop a thread for good
JOIN_S = 10.0  # how long a thread may take to notice that its group was aborted


def buffers(nbytes: int, device: torch.device) -> list[torch.Tensor]:
    """What a Sender or a Receiver works with: uint8, on `device`."""
    return [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(BUFFERS)]


class Sender:
    """Rank 0's end of one transfer, on one thread. Raises TransferError, from any method, where
    a bucket has not reached every rank by the deadline, or the group was aborted. `buckets`: how
    many there will be, 0 if that is not known.

    On CUDA the current stream fills, another one sends. `ahead`: no fill makes this thread wait
    for the GPU, so the next ones may be asked for while their buffers are still being sent.
    `barrier`: the first bucket is not sent before every rank is there to take it.
    """

    def __init__(
        self,
        group: Communicator,
        memory: Sequence[torch.Tensor],
        buckets: int,
        timeout_s: float,
        *,
        ahead: bool = False,
        barrier: Barrier | None = None,
    ) -> None:
        self._group, self._memory, self._buckets, self._ahead = group, memory, buckets, ahead
        self._barrier = barrier
        self._met: Pending | None = None
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._pending: deque[Pending] = deque()
        self._last: deque[Pending] = deque(maxlen=len(memory))  # sent from each buffer
        self._begun = 0

    @property
    def arrived(self) -> int:
        """Buckets that every rank has."""
        return self._begun - len(self._pending)

    def buffer(self) -> torch.Tensor:
        """Where to put the next bucket, after the one that was there: by the current stream, or
        once this returns."""
        while len(self._pending) >= AHEAD:
            self._oldest()
        full = len(self._last) == len(self._memory)
        if full and not (self._ahead and self._last[0].order()):
            while len(self._pending) >= len(self._memory):
                self._oldest()
        return self._memory[self._begun % len(self._memory)]

    def send(self, nbytes: int) -> None:
        """Broadcast the first bytes of `buffer()`. Waits for a barrier, if a stream cannot."""
        barrier, self._barrier = self._barrier, None
        data = self._memory[self._begun % len(self._memory)][:nbytes]
        with on_side_stream(data.device, "send", after=current_stream(data.device)):
            if barrier is not None:
                self._met = barrier(self._left_s)
                if not self._met.order():
                    self._all_begun()
            pending = self._group.broadcast(data, self._left_s)
        self._pending.append(pending)
        self._last.append(pending)
        self._begun += 1

    def put(self, data: torch.Tensor) -> None:
        """Send these bytes (uint8, of the host) as the next bucket."""
        place = self.buffer()[: len(data)]
        if place.is_cuda:  # from other memory a copy waits, and knows no deadline
            data = data.pin_memory()
        place.copy_(data, non_blocking=True)
        self.send(len(data))

    def drain(self) -> None:
        """Wait until every bucket has arrived."""
        while self._pending:
            self._oldest()

    def _all_begun(self) -> None:
        met, self._met = self._met, None
        if met is not None:
            self._until(met, "the update", "was not begun by")

    def _oldest(self) -> None:
        self._all_begun()
        what = f"bucket {self.arrived + 1}" + f" of {self._buckets}" * bool(self._buckets)
        self._until(self._pending[0], what, "was not taken by")
        self._pending.popleft()

    @property
    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def _until(self, pending: Pending, what: str, lacks: str) -> None:
        pauses = _pauses()
        while not _done(pending, self._group, what):
            if self._left_s < 0:
                error = f"{what} {lacks} every rank within {self._timeout_s:g} s"
                self._group.abort(error)
                raise TransferError(error, where=f"rank 0 of {self._group.world_size}")
            time.sleep(next(pauses))


class Receiver:
    """Another rank's end: a thread of its own receives; the methods are for the thread that copies.

    `memory[i % len(memory)]` takes bucket i, of `sizes[i]` bytes. On CUDA the copies are ordered
    by the current stream of whoever calls `next` and `release`. `barrier`: as a Sender's.
    """

    def __init__(
        self,
        group: Communicator,
        memory: Sequence[torch.Tensor],
        sizes: Sequence[int],
        timeout_s: float,
        *,
        barrier: Barrier | None = None,
    ) -> None:
        self._group, self._memory, self._sizes = group, memory, sizes
        self._barrier = barrier
        self._timeout_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        self._flights: deque[Pending] = deque()  # begun, and not given out by `next`
        # What the memory was used for before may not be over yet.
        self._free = deque([_so_far(memory[0])] * len(memory))
        self._changed = threading.Condition()
        self._error: TransferError | None = None
        self._given = 0
        self.arrived = 0  # buckets
        self._thread = run(self._run, "receive", lambda: group.abort("the process ends"))

    def next(self, wait_s: float, *, ahead: bool = False) -> int | None:
        """The next bucket, once it is here; None if it is not within `wait_s`. Raises what the
        transfer failed with, naming the bucket. `ahead`: it may still be on its way, where the
        current stream can be told to come after it."""
        deadline = time.monotonic() + wait_s
        with self._changed:
            if not self._wait(lambda: bool(self._flights), deadline):
                return None
            if not (ahead and self._flights[0].order()) and not self._wait(
                lambda: self.arrived > self._given, deadline
            ):
                return None
            self._flights.popleft()
            self._given += 1
            return self._given - 1

    def release(self) -> None:
        """The bucket that `next` gave has been copied, or will be by the current stream."""
        event = _so_far(self._memory[0])
        with self._changed:
            self._free.append(event)
            self._changed.notify_all()

    def complete(self, wait_s: float) -> bool:
        """Whether every bucket is here, after a moment's wait. Raises as `next`."""
        with self._changed:
            deadline = time.monotonic() + wait_s
            return self._wait(lambda: self.arrived == len(self._sizes), deadline)

    def abort(self, reason: str) -> None:
        """End the transfer and its group, wait for the thread. Idempotent.

        Raises TransferError if the thread does not end; its group cannot be closed then."""
        self._group.abort(reason)
        with self._changed:
            self._changed.notify_all()
        if wait([self._thread], JOIN_S).not_done:
            raise TransferError(f"the receive did not end within {JOIN_S:g} s of its abort")

    def _wait(self, condition: Callable[[], bool], deadline: float) -> bool:
        left = max(0.0, deadline - time.monotonic())
        self._changed.wait_for(lambda: condition() or self._error is not None, left)
        if self._error is not None:
            raise self._error
        return condition()

    def _run(self) -> None:
        try:
            with on_side_stream(self._memory[0].device, "receive"):
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
        if self._barrier is not None:
            met = self._barrier(self._left_s)
            if not met.order():
                self._meet(met)
        pending: deque[Pending] = deque()
        begun, pauses = 0, _pauses()

        def room() -> bool:
            return begun < len(self._sizes) and bool(self._free) and len(pending) < AHEAD

        while self.arrived < len(self._sizes):
            if room():
                pending.append(self._begin(begun))
                begun += 1
            elif pending and _done(pending[0], self._group, ""):
                pending.popleft()
                pauses = _pauses()
                with self._changed:
                    self.arrived += 1
                    self._changed.notify_all()
            elif self._left_s < 0:
                raise TransferError(f"nothing came from rank 0 within {self._timeout_s:g} s")
            elif self._group.aborted:
                raise TransferError(self._group.aborted)
            else:
                with self._changed:
                    self._changed.wait_for(room, next(pauses))

    @property
    def _left_s(self) -> float:
        return self._deadline - time.monotonic()

    def _meet(self, barrier: Pending) -> None:
        pauses = _pauses()
        while not _done(barrier, self._group, ""):
            if self._left_s < 0:
                raise TransferError(f"not every rank had begun within {self._timeout_s:g} s")
            time.sleep(next(pauses))

    def _begin(self, index: int) -> Pending:
        """After the last copy out of the same buffer."""
        with self._changed:
            event = self._free.popleft()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        data = self._memory[index % len(self._memory)][: self._sizes[index]]
        flight = self._group.broadcast(data, self._left_s)
        with self._changed:
            self._flights.append(flight)
            self._changed.notify_all()
        return flight


def _so_far(memory: torch.Tensor) -> torch.cuda.Event | None:
    """What the current stream has been given; None without CUDA."""
    if not memory.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _pauses() -> Iterator[float]:
    """Seconds to sleep; they begin short: a bucket over NVLink takes a millisecond."""
    s = 2e-5
    while True:
        yield s
        s = min(s * 1.3, 5e-4)


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
def _side_stream(device: torch.device, work: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Of this thread; None without CUDA."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


@contextmanager
def on_side_stream(
    device: torch.device, work: str, after: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Give `work` to its own stream beside the others', after what `after` has been given. A new
    thread knows neither the device nor the streams of the one that starts it."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(_side_stream(device, work)):
        if after is not None:
            torch.cuda.current_stream().wait_stream(after)
        yield
