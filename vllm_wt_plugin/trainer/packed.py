"""Packed pushes: for trainers whose tensors exist one at a time (FSDP gathers).

Two bounded buffers on the trainer's device. While the workers copy one, the trainer fills the
other; what is where follows from the specs alone (`wire/buckets.py`). Ranks that gather together
have two buffers each, with the same bytes, so that a worker finds them on its own GPU; rank 0
talks to the replicas.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import torch

from vllm_wt_plugin.errors import RequestError, UnknownRegistration
from vllm_wt_plugin.trainer.client import Client
from vllm_wt_plugin.trainer.ranks import ALONE, Ranks
from vllm_wt_plugin.trainer.source import Source, device_of, gathers
from vllm_wt_plugin.transport.ipc import Exporter
from vllm_wt_plugin.wire.buckets import Piece, cut, size
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.wire.messages import Announcement, FinishBody, PlanReport, StartBody
from vllm_wt_plugin.wire.params import ParamSpec

BUFFERS = 2


class PackedSender:
    """The buffers of one trainer and what its replicas know of them. `close()` frees both.

    With several `ranks` making one is collective, and so is `push`.
    """

    def __init__(self, specs: tuple[ParamSpec, ...], buffer_bytes: int, device: torch.device,
                 ranks: Ranks) -> None:  # fmt: skip
        self.specs, self.ranks = specs, ranks
        self.buckets = cut(specs, buffer_bytes)
        # No larger than they are filled: on CPU whole buffers are copied. The cut is the same.
        buffer_bytes = max([1, *map(size, self.buckets)])
        with ranks.step():
            self._memory = [
                torch.empty(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(BUFFERS)
            ]
            # An exporter each: on CPU `refresh` copies what is registered, here one buffer.
            self._exporters = [Exporter() for _ in self._memory]
            mine = tuple(
                e.register([(f"buffer {i}", m)])[0]
                for i, (e, m) in enumerate(zip(self._exporters, self._memory, strict=True))
            )
        rows = ranks.gather(msgspec.json.encode(mine))
        all_ = [r for row in rows for r in msgspec.json.decode(row, type=list[Registration])]
        self.announcement = Announcement(
            secrets.token_hex(16), specs, buffer_bytes, tuple(all_), ranks=ranks.size
        )

    def push(
        self, client: Client, source: Source, version: str, owner: str, known: bool
    ) -> Outcome:
        """Start, every bucket, finish. `known`: the replica has this announcement already."""
        session, report = "", None
        seconds: dict[str, float] = {}
        leads = self.ranks.leads
        try:
            with self.ranks.step():
                if leads:
                    session, report = self._start(client, owner, known)
            with ThreadPoolExecutor(1, thread_name_prefix="weight-bucket") as sender:
                self._stream(client, session, source, sender, seconds)
            with self.ranks.step():
                if leads:
                    _add(seconds, client.finish(FinishBody(version, session)).seconds)
        except BaseException:  # raised again: an interrupt too must leave no update open
            if session:
                client.abort(session, "the trainer failed while it sent packed buckets")
            raise
        return Outcome(version, seconds, report)

    def _start(self, client: Client, owner: str, known: bool) -> tuple[str, PlanReport | None]:
        a = self.announcement
        body = StartBody(owner=owner, announced=a.id, announce=None if known else a)
        try:
            return client.start(body)
        except UnknownRegistration:
            return client.start(StartBody(owner=owner, announced=a.id, announce=a))

    def _stream(
        self,
        client: Client,
        session: str,
        source: Source,
        sender: ThreadPoolExecutor,
        seconds: dict[str, float],
    ) -> None:
        rows = Rows(source)
        sent: list[Future[dict[str, float]]] = []  # rank 0's

        def settled(futures: list[Future[dict[str, float]]]) -> None:
            for future in futures:
                _add(seconds, future.result())

        for index, pieces in enumerate(self.buckets):
            if index >= BUFFERS:  # this buffer's last bucket must have been copied
                with self.ranks.step():
                    settled(sent[index - BUFFERS : index - BUFFERS + 1])
            buffer = self._memory[index % BUFFERS]
            with self.ranks.step():  # every rank has filled its own
                for piece in pieces:
                    rows.write(piece, buffer)
                self._exporters[index % BUFFERS].refresh()
            if self.ranks.leads:
                sent.append(sender.submit(client.bucket, session, index))
        with self.ranks.step():
            rows.finish()
            settled(sent[-BUFFERS:])

    def close(self) -> None:
        for e in self._exporters:
            e.close()
        self._memory.clear()


class PackedSenders:
    """Keeps the sender of the last source, and makes another where its tensors differ, or the ranks
    that gather it."""

    def __init__(self, buffer_bytes: int, timeout_s: float) -> None:
        self._buffer_bytes, self._timeout_s = buffer_bytes, timeout_s
        self._last: PackedSender | None = None
        self._ranks: Ranks | None = None

    def get(self, source: Source, specs: tuple[ParamSpec, ...], replicas: int) -> PackedSender:
        """Collective over all ranks of the default group for a source that they gather together;
        one that is there whole each rank pushes alone."""
        ranks = ALONE
        if gathers(source):
            self._ranks = ranks = self._ranks or Ranks.of_default_group(self._timeout_s)
        ranks.agree("tensors, buffers or replicas", (specs, self._buffer_bytes, replicas))
        if self._last is None or (self._last.specs, self._last.ranks) != (specs, ranks):
            self.close()
            self._last = PackedSender(specs, self._buffer_bytes, device_of(source), ranks)
        return self._last

    def close(self) -> None:
        """Free the buffers. Idempotent."""
        if self._last is not None:
            self._last.close()
        self._last = None


class Rows:
    """Walks a source in step with its pieces; holds one tensor at a time. `see` is told of each
    tensor when it comes."""

    def __init__(
        self,
        source: Iterable[tuple[str, torch.Tensor]],
        see: Callable[[str, torch.Tensor], None] = lambda *_: None,
    ) -> None:
        self._see = see
        self._tensors: Iterator[tuple[str, torch.Tensor]] = iter(source)
        self._name, self._tensor = "", torch.empty(0)

    def write(self, piece: Piece, buffer: torch.Tensor) -> None:
        """Copy the piece's rows to its place in `buffer`."""
        place, rows = self.pair(piece, buffer)
        place.copy_(rows)

    def pair(self, piece: Piece, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The piece's place in `buffer`, and its rows, with the dtype that was announced."""
        spec = piece.spec
        if self._name != spec.name:
            self._name, self._tensor = self._next(spec.name)
        have = ParamSpec(self._name, str(self._tensor.dtype).removeprefix("torch."),
                         tuple(self._tensor.shape))  # fmt: skip
        if have != spec:
            raise RequestError(
                f"the source yields {have.name} {have.shape} {have.dtype}, "
                f"it announced {spec.name} {spec.shape} {spec.dtype}",
                where=spec.name,
                next_step="make specs() and iteration of the source agree",
            )
        place = buffer[piece.offset : piece.offset + piece.nbytes].view(self._tensor.dtype)
        t = self._tensor
        rows = t[piece.row : piece.row + piece.rows] if t.dim() else t
        return place.view(piece.shape), rows

    def _next(self, wanted: str) -> tuple[str, torch.Tensor]:
        for name, tensor in self._tensors:
            if tensor.numel():
                self._see(name, tensor)
                return name, tensor
        raise RequestError(
            "the source ended before this tensor",
            where=wanted,
            next_step="make specs() and iteration of the source agree",
        )

    def exhaust(self) -> None:
        """Walk to the end after a failure: ranks that gather together must all get there."""
        for _ in self._tensors:
            pass

    def finish(self) -> None:
        """Nothing may be left; ranks that gather together must all reach the end."""
        left = [name for name, t in self._tensors if t.numel()]
        if left:
            raise RequestError(
                f"the source yields {len(left)} tensors more than it announced",
                where=left[0],
                next_step="make specs() and iteration of the source agree",
            )


def _add(seconds: dict[str, float], more: dict[str, float]) -> None:
    for phase, s in more.items():
        seconds[phase] = seconds.get(phase, 0.0) + s
