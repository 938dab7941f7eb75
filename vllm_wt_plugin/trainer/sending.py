"""The trainer's end of one broadcast, on a thread of its own: bytes out, checksums beside them.

source → Filling or Walk → nccl.Sender ⇢ every worker of every replica
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from vllm_wt_plugin.sparse.checksum import begin_runs
from vllm_wt_plugin.trainer.client import Client
from vllm_wt_plugin.trainer.filling import Filling, Walk
from vllm_wt_plugin.trainer.listing import Listing
from vllm_wt_plugin.trainer.meeting import GroupOptions, Meeting
from vllm_wt_plugin.trainer.source import gathers
from vllm_wt_plugin.transport import group, nccl
from vllm_wt_plugin.wire.buckets import Geometry, buckets_of, size
from vllm_wt_plugin.wire.messages import StartBody
from vllm_wt_plugin.wire.nccl import buffer_nbytes
from vllm_wt_plugin.wire.params import ParamSpec

QUEUED = 4  # buckets, after the first
Sums = dict[str, dict[str, int]]  # of a name, by the dtype that it was summed in


@dataclass
class Update:
    """One update: of what, for whom, how it is begun, and the dtypes that each checked name is to
    be summed in."""

    meeting: Meeting
    source: Listing
    version: str
    clients: list[Client]
    body: StartBody
    names: dict[str, set[str]]

    @property
    def forms(self) -> tuple[str, ...]:
        return tuple(sorted(set().union(*self.names.values())))

    def told(self, sums: Sums) -> torch.Tensor:
        """uint8: what is broadcast of the checksums, [names, forms] of int64."""
        rows = [[sums[n].get(f, 0) for f in self.forms] for n in self.names]
        return torch.tensor(rows, dtype=torch.int64).view(-1).view(torch.uint8)


class Outgoing:
    """What stays the same from one push of the same tensors to the next: cut, buffers, copies."""

    def __init__(self, specs: tuple[ParamSpec, ...], options: GroupOptions) -> None:
        self.geometry: Geometry = "rows" if options.packed else "apart"
        self._buckets = buckets_of(specs, self.geometry, options.buffer_bytes)
        self._timeout_s = options.timeout_s
        self._memory: list[torch.Tensor] = []
        self._filling: Filling | None = None

    def make_room(self, device: torch.device) -> None:
        """Have buffers there."""
        if not self._memory or self._memory[0].device != device:
            self._memory = nccl.buffers(buffer_nbytes(self._buckets), device)
            self._filling = None

    def send(self, update: Update, *, together: bool = False) -> Future[Sums]:
        """Begin to broadcast every bucket. `together`: once every rank has begun, and the
        checksums behind the last. Aborts the group where it fails; a source that gathers is walked
        to its end even then."""
        meeting, source = update.meeting, update.source
        device, after = meeting.device, nccl.current_stream(meeting.device)

        def send() -> Sums:
            summing = Summing(update.names, source.tensors or ())
            fill: Filling | Walk = Walk(source, self._buckets, self._memory, summing.see)
            with nccl.on_side_stream(device, "fill", after), torch.no_grad():
                try:
                    if source.tensors is not None:
                        fill = self._planned(source)
                    sender = nccl.Sender(
                        meeting.group, self._memory, len(self._buckets), self._timeout_s,
                        ahead=fill.ahead, barrier=meeting.group.barrier if together else None,
                    )  # fmt: skip

                    def sum_() -> None:
                        with nccl.on_side_stream(device, "sum", after):
                            summing.begin()

                    self._fill_all(sender, fill, sum_)
                    sums = summing.result()
                    if together and update.forms:
                        sender.put(update.told(sums))
                    sender.drain()
                    return sums
                except BaseException as exc:
                    meeting.group.abort(str(exc))
                    if gathering(source):
                        fill.exhaust()
                    raise

        return group.run(send, "broadcast", lambda: meeting.group.abort("the process ends"))

    def _fill_all(
        self, sender: nccl.Sender, fill: Filling | Walk, sum_: Callable[[], None]
    ) -> None:
        """`sum_` takes the host some milliseconds: once there are buckets to last for them."""
        for i, bucket in enumerate(self._buckets):
            sender.buffer()
            fill.fill(i)
            sender.send(size(bucket))
            if i == QUEUED:
                sum_()
        if len(self._buckets) <= QUEUED:
            sum_()
        fill.finish()

    def _planned(self, source: Listing) -> Filling:
        """The same as last time for the same tensors in the same buffers."""
        if self._filling is None or self._filling.source is not source:
            self._filling = Filling(source, self._buckets, self._memory)
        return self._filling


def send_bytes(meeting: Meeting, data: torch.Tensor, each: int, timeout_s: float) -> Future[None]:
    """Begin to broadcast `data` (uint8), so many bytes at a time. Aborts the group if it fails."""
    after = nccl.current_stream(meeting.device)
    parts = data.to(meeting.device).split(each)

    def send() -> None:
        sender = nccl.Sender(meeting.group, parts, len(parts), timeout_s, ahead=True)
        try:
            with nccl.on_side_stream(meeting.device, "fill", after):
                for part in parts:
                    sender.buffer()
                    sender.send(len(part))
                sender.drain()
        except BaseException as exc:
            meeting.group.abort(str(exc))
            raise

    return group.run(send, "broadcast", lambda: meeting.group.abort("the process ends"))


def gathering(source: Listing) -> bool:
    """Whether iterating it is collective: every rank of the trainer must, to the end, and once."""
    return source.tensors is None and gathers(source.source)


def walk(source: Listing) -> None:
    """Iterate a source that gathers, so that it lines up with the rank that sends."""
    if gathering(source):
        for _ in source:
            pass


class Summing:
    """Checksums of what is sent: of a walk's tensors while they are there; of `lasting` ones on a
    GPU while they are sent, and elsewhere after that, for replicas wait for the first bucket."""

    def __init__(
        self, dtypes: dict[str, set[str]], lasting: Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        self._dtypes, self._lasting = dtypes, [(n, t) for n, t in lasting if n in dtypes]
        self._begun: list[tuple[list[tuple[str, str]], Callable[[], list[int]]]] = []

    def begin(self) -> None:
        """Give the current stream those that last."""
        self._add([(n, t) for n, t in self._lasting if t.is_cuda])

    def see(self, name: str, t: torch.Tensor) -> None:
        self._add([(name, t)])

    def _add(self, tensors: list[tuple[str, torch.Tensor]]) -> None:
        rows = [(n, d, t) for n, t in tensors for d in self._dtypes.get(n, ())]
        cast = [(n, t.to(getattr(torch, d)) if d else t, 0) for n, d, t in rows]
        if rows:
            self._begun.append(([(n, d) for n, d, _ in rows], begin_runs(cast)))

    def result(self) -> Sums:
        """Blocking, after `begin`."""
        self._add([(n, t) for n, t in self._lasting if not t.is_cuda])
        sums: Sums = defaultdict(dict)
        for rows, begun in self._begun:
            for (n, d), s in zip(rows, begun(), strict=True):
                sums[n][d] = s
        return dict(sums)
