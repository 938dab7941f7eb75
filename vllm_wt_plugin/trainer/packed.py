"""Packed pushes: for trainers whose tensors exist one at a time (FSDP gathers).

Two bounded buffers on the trainer's device. While the workers copy one, the trainer fills the
other; what is where follows from the specs alone (`wire/buckets.py`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from vllm_wt_plugin.errors import RequestError, UnknownRegistration
from vllm_wt_plugin.trainer.client import HTTPClient
from vllm_wt_plugin.trainer.source import Source
from vllm_wt_plugin.transport.ipc import Exporter
from vllm_wt_plugin.wire.buckets import Piece, cut
from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.messages import Announcement, PlanReport, StartBody
from vllm_wt_plugin.wire.params import ParamSpec

BUFFERS = 2


class PackedSender:
    """The buffers of one trainer and what its replicas know of them. `close()` frees both."""

    def __init__(self, specs: tuple[ParamSpec, ...], buffer_bytes: int, device: torch.device
                 ) -> None:  # fmt: skip
        self.specs = specs
        self.buckets = cut(specs, buffer_bytes)
        self._memory = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(BUFFERS)
        ]
        # An exporter each: on CPU `refresh` copies what is registered, here one buffer.
        self._exporters = [Exporter() for _ in self._memory]
        registers = tuple(
            e.register([(f"buffer {i}", m)])[0]
            for i, (e, m) in enumerate(zip(self._exporters, self._memory, strict=True))
        )
        self.announcement = Announcement(secrets.token_hex(16), specs, buffer_bytes, registers)

    def push(
        self, client: HTTPClient, source: Source, version: str, owner: str, known: bool
    ) -> Outcome:
        """Start, every bucket, finish. `known`: the replica has this announcement already."""
        session, report = self._start(client, owner, known)
        seconds: dict[str, float] = {}
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="weight-bucket") as sender:
                self._stream(client, session, source, sender, seconds)
            end = {"session": session, "weight_version": version}
            done = client.post("/finish_weight_update", end)
        except BaseException:
            client.abort(session, "the trainer failed while it sent packed buckets")
            raise
        for phase, s in done["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + s
        return Outcome(str(done["version"]), seconds, report)

    def _start(self, client: HTTPClient, owner: str, known: bool) -> tuple[str, PlanReport | None]:
        a = self.announcement
        body = StartBody(owner=owner, announced=a.id, announce=None if known else a)
        try:
            return client.start(body)
        except UnknownRegistration:
            return client.start(StartBody(owner=owner, announced=a.id, announce=a))

    def _stream(
        self,
        client: HTTPClient,
        session: str,
        source: Source,
        sender: ThreadPoolExecutor,
        seconds: dict[str, float],
    ) -> None:
        rows = Rows(source)
        sent: list[Future[dict[str, Any]]] = []
        for index, pieces in enumerate(self.buckets):
            if index >= BUFFERS:  # this buffer's last bucket must have been copied
                _add(seconds, sent[index - BUFFERS].result())
            buffer = self._memory[index % BUFFERS]
            for piece in pieces:
                rows.write(piece, buffer)
            self._exporters[index % BUFFERS].refresh()
            body = {"session": session, "update_info": {"bucket": index}}
            sent.append(sender.submit(client.post, "/update_weights", body))
        rows.finish()
        for future in sent[-BUFFERS:]:
            _add(seconds, future.result())

    def close(self) -> None:
        for e in self._exporters:
            e.close()
        self._memory.clear()


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
        """Copy the piece's rows to its place in `buffer`, with the dtype that was announced."""
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
        place.view(piece.shape).copy_(t[piece.row : piece.row + piece.rows] if t.dim() else t)

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


def _add(seconds: dict[str, float], answer: dict[str, Any]) -> None:
    for phase, s in answer["seconds"].items():
        seconds[phase] = seconds.get(phase, 0.0) + s
