"""A group that one trainer broadcasts to: torch's NCCL between GPUs, its gloo on CPU, one code.

    listen (sender) ─ address, by HTTP ─▶ join (everyone) → Group.broadcast … Group.close

It meets at a TCPStore of its own and never touches torch's default group. Every wait is polled and
has a deadline, so `abort` from any thread ends it; once a group is aborted it is over, and a new
one is made.
"""

from __future__ import annotations

import atexit
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from vllm_wt_plugin.errors import NotJoined, RequestError, TransferError
from vllm_wt_plugin.transport.backends import Gloo, Member, Nccl, Pending, first_line, told

T = TypeVar("T")
ATTEMPT_S = 2.0  # one try to connect to the store; it cannot be interrupted
LATE_S = 2.0
FREE_S = 1.0  # torch's threads, where they end at all, do so within milliseconds
_groups: weakref.WeakSet[Group] = weakref.WeakSet()
_ends: weakref.WeakKeyDictionary[threading.Thread, Callable[[], object]]
_ends = weakref.WeakKeyDictionary()


class Communicator(Protocol):
    """What `nccl.Sender` and `nccl.Receiver` need of a group. Rank 0 sends."""

    rank: int
    world_size: int
    aborted: str  # why, once it is

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> Pending:
        """Start to fill `tensor` (contiguous) with rank 0's, after what the current stream has
        been given. It must stay untouched until the result says `done`. Whoever asks for that
        gives up within `timeout_s`, and aborts."""

    def abort(self, reason: str) -> None:
        """End it, and whatever waits for it, from any thread. Idempotent."""

    def close(self) -> None:
        """Free everything, once no thread uses it. Idempotent."""


def listen(host: str, port: int = 0) -> TCPStore:
    """The sender's store, on one of this machine's addresses only. Its `port` tells which was
    free. Raises RequestError where the address cannot be had."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(info[0], socket.SOCK_STREAM) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(info[4])
            s.listen()
            bound = s.getsockname()[1]
            return TCPStore(
                host, bound, None, True, timeout=timedelta(seconds=ATTEMPT_S),
                wait_for_workers=False, master_listen_fd=s.detach(), use_libuv=False,
            )  # fmt: skip
    except OSError as exc:
        raise RequestError(
            f"no group can meet at {host}:{port}: {exc}",
            next_step="choose an address of this machine and a free port (0: any)",
        ) from exc


def join(
    at: Member,
    device: torch.device,
    timeout_s: float,
    stop: threading.Event,
    store: TCPStore | None = None,
) -> Group:
    """Meet the others and connect. Collective; rank 0 brings the `store` it listens with.

    Blocking, at most `timeout_s` on rank 0, which knows who has not come, and a moment longer on
    the others, so that they hear it; less if `stop` is set. Raises TransferError that names the
    ranks which have not come.
    """
    wait = Patience(at, timeout_s if at.rank == 0 else timeout_s + LATE_S, stop)
    # What is made here belongs to the device, which a new thread does not know.
    on = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with told(f"rank {at.rank}"), on:
        store = store or connect(at, wait)
        keys = PrefixStore(at.group, store)
        store.set_timeout(timedelta(seconds=timeout_s))
        backend: Gloo | Nccl = Gloo(at) if device.type == "cpu" else Nccl(at)
        keys.set(f"here/{at.rank}", backend.port)
        if at.rank == 0:
            away = list(range(1, at.world_size))

            def all_here() -> bool:
                away[:] = [r for r in away if not keys.check([f"here/{r}"])]
                return not away

            try:
                wait(all_here, lambda: f"ranks {', '.join(map(str, away))} did not join")
            except TransferError as exc:
                keys.set("off", exc.what)
                if isinstance(exc, NotJoined):
                    exc.ranks = tuple(away)
                raise
            keys.set("go", "")
        else:
            wait(lambda: _called(keys), lambda: "rank 0 did not see every rank join")
        made = backend.connect(keys, max(1.0, wait.left_s))
        one = torch.zeros(1, dtype=torch.uint8, device=device)
        group = Group(at, backend, made, (keys, store), one)
        try:
            first = group.broadcast(one, max(1.0, wait.left_s))
            wait(first.done, lambda: "the first broadcast did not end")
        except BaseException:
            group.close()
            raise
    return group


class Joining:
    """`join`, or any other way to make a group, on a thread of its own.

    `meet` returns the group, or raises; it ends soon after the event that it is given is set.
    """

    def __init__(self, meet: Callable[[threading.Event], Communicator]) -> None:
        self._stop = threading.Event()
        self.future = run(lambda: self._closed_if_late(meet(self._stop)), "join", self._stop.set)

    def wait(self, s: float) -> Communicator | None:
        """The group; None if there is none within `s` seconds. Raises what `meet` raised."""
        try:
            return self.future.result(s)
        except TimeoutError:
            return None

    def abort(self) -> None:
        """Does not wait; a group that is made nevertheless is closed."""
        self._stop.set()
        if self.future.done() and self.future.exception() is None:
            self.future.result().close()

    def _closed_if_late(self, made: Communicator) -> Communicator:
        if self._stop.is_set():
            made.close()
        return made


class Group:
    """A `Communicator` on torch. Call `broadcast` from one thread, `abort` and `close` from any."""

    def __init__(
        self,
        at: Member,
        backend: Gloo | Nccl,
        made: Any,
        stores: tuple[Store, ...],
        one: torch.Tensor,
    ) -> None:
        self._one = one  # uint8 on the group's device, whose value nobody reads
        self.rank, self.world_size = at.rank, at.world_size
        self.aborted = ""
        self._backend, self._made, self._stores = backend, made, stores
        self._lock = threading.Lock()
        _groups.add(self)

    def broadcast(self, tensor: torch.Tensor, timeout_s: float) -> Pending:
        if self.aborted:
            raise TransferError(self.aborted)
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.asyncOp = True
        options.timeout = self._backend.timeout(timeout_s)
        with told(f"rank {self.rank}"):
            return self._backend.pending(self._made.broadcast([tensor], options))

    def barrier(self, timeout_s: float) -> Pending:
        """Start to wait until every rank has called this; otherwise as `broadcast`."""
        if self.aborted:
            raise TransferError(self.aborted)
        options = dist.AllreduceOptions()
        options.timeout = self._backend.timeout(timeout_s)
        with told(f"rank {self.rank}"):
            return self._backend.pending(self._made.allreduce([self._one], options))

    def abort(self, reason: str) -> None:
        with self._lock:
            if not self.aborted:
                self.aborted = reason
                self._backend.abort(self._made)

    def close(self) -> None:
        """Free everything; after the threads that use the group have ended. Idempotent.

        Gloo's own threads can outlive this (`Gloo.timeout`); another thread waits for them."""
        self.abort("the group is closed")
        with self._lock:
            held = [self._made, *self._stores]  # in this order: its threads may still ask them
            self._made, self._stores = None, ()
        if held[0] is not None:
            wait([run(lambda: _free(held), "free", lambda: None)], FREE_S)


def _free(held: list[Any]) -> None:
    while held:
        del held[0]


class Patience:
    """Waits of one rank that all end at one deadline, or soon after `stop` is set."""

    def __init__(self, at: Member, timeout_s: float, stop: threading.Event) -> None:
        self._at, self._timeout_s, self._stop = at, timeout_s, stop
        self._deadline = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        return self._deadline - time.monotonic()

    def __call__(
        self, condition: Callable[[], bool], what: Callable[[], str], next_step: str = ""
    ) -> None:
        """Poll `condition`. Raises NotJoined that says `what` was waited for, or TransferError."""
        at = self._at
        while not condition():
            if self._stop.is_set():
                raise TransferError("the rendezvous was aborted", where=f"rank {at.rank}")
            if self.left_s < 0:
                raise NotJoined(
                    f"{what()} within {self._timeout_s:g} s",
                    where=f"rank {at.rank} of {at.world_size}",
                    next_step=next_step
                    or f"check that every rank was asked to join and reaches {at.host}:{at.port}",
                )
            time.sleep(0.005)


def connect(at: Member, wait: Patience, *, counted: bool = False) -> TCPStore:
    """The store that the others meet at. `counted`: its owner waits until all are connected."""
    made: list[TCPStore] = []
    why = ""

    def attempt() -> bool:
        nonlocal why
        try:
            made.append(
                TCPStore(
                    at.host,
                    at.port,
                    at.world_size if counted else None,
                    False,
                    timeout=timedelta(seconds=ATTEMPT_S),
                    wait_for_workers=counted,
                    use_libuv=False,
                )
            )
        except RuntimeError as exc:
            why = first_line(exc)
            return False
        return True

    wait(attempt, lambda: f"nobody answered at {at.host}:{at.port} ({why})")
    return made[0]


def _called(keys: Store) -> bool:
    """Whether rank 0 says that all are here. Raises NotJoined where it has given up."""
    if keys.check(["off"]):
        raise NotJoined(f"rank 0 gave up: {keys.get('off').decode()}")
    return keys.check(["go"])


def run(target: Callable[[], T], name: str, end: Callable[[], object]) -> Future[T]:
    """Call `target` on a thread that is ended and waited for before the interpreter goes: one that
    was still inside torch would bring down the process. `end` makes `target` return soon."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(target())
        # Whoever waits for the future gets it.
        except BaseException as exc:
            future.set_exception(exc)

    thread = threading.Thread(target=work, name=f"weight-{name}", daemon=True)
    _ends[thread] = end
    thread.start()
    return future


@atexit.register
def _end_all() -> None:
    running = list(_ends.items())
    for _, end in running:
        end()
    for thread, _ in running:
        thread.join(2 * ATTEMPT_S)
    for group in list(_groups):
        group.close()
