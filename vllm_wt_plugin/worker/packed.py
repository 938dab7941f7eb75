"""Packed updates on the worker: tensors that come in rows, through buffers that are used again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch

from vllm_wt_plugin.errors import HandleError, PlanError, RequestError
from vllm_wt_plugin.sparse.checksum import checksum_run, wrap
from vllm_wt_plugin.transport import nccl
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.wire.buckets import Piece, buckets_of, size
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.wire.messages import Announcement
from vllm_wt_plugin.wire.nccl import SUM_BYTES, buffer_nbytes
from vllm_wt_plugin.wire.patches import Part
from vllm_wt_plugin.worker.plan.batch import Batch
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.plan import LoadPlan
from vllm_wt_plugin.worker.plan.update import Update, differ


class Announced:
    """What stays the same from one packed push to the next: plan, cut, buffers, copies.

    Of several trainer ranks this worker, number `rank`, reads from the one on its own GPU.
    """

    def __init__(
        self, new: Announcement, plan: LoadPlan, importer: Importer, device: torch.device, rank: int
    ) -> None:
        for a, b in plan.must_equal:
            one, two = plan.specs[a.name], plan.specs[b.name]
            if (one.dtype, one.shape, a.source) != (two.dtype, two.shape, b.source):
                raise PlanError(
                    f"parts of {a.name} and {b.name} are one tensor in the served model, which a "
                    "packed push cannot compare",
                    where=a.name,
                    next_step="push with packed=False, or leave one of the names out",
                )
        self.plan, self.importer = plan, importer
        self.registrations = _nearest(new, importer, rank)
        self.specs = new.specs
        self.buckets = buckets_of(new.specs, new.geometry, new.buffer_bytes)
        self.ends = {p.spec.name: i for i, b in enumerate(self.buckets) for p in b}  # last bucket
        self.memory: list[torch.Tensor] = []
        self.batches: dict[int, Batch] = {}  # by bucket, once built
        try:
            for reg in self.registrations:
                tensors = list(importer.open(reg).values())
                if [(t.dtype, tuple(t.shape)) for t in tensors] != [
                    (torch.uint8, (new.buffer_bytes,))
                ]:
                    raise HandleError("the buffer is not what was announced", where="buffers")
                self.memory += tensors
            if not new.buffers:  # what is broadcast arrives in buffers of our own
                self.memory = nccl.buffers(buffer_nbytes(self.buckets), device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the buffers."""
        self.memory.clear()
        self.batches.clear()
        for reg in self.registrations:
            self.importer.close(reg.id)


def _nearest(new: Announcement, importer: Importer, rank: int) -> tuple[Registration, ...]:
    """The buffers of a trainer rank on the worker's GPU; where there is none, of one of them."""
    if not new.buffers:
        return ()
    each = len(new.buffers) // new.ranks
    if each * new.ranks != len(new.buffers):
        raise HandleError(
            f"{len(new.buffers)} buffers for {new.ranks} trainer ranks", where="buffers"
        )
    sets = [new.buffers[i : i + each] for i in range(0, len(new.buffers), each)]
    near = [s for s in sets if importer.near(s[0])]
    return near[0] if near else sets[rank % len(sets)]


Summing = Callable[[], dict[str, list[Part]]]
EARLY = 3  # so many buckets before the last, what has come is summed


class PackedUpdate:
    """One packed update under way: buckets in order, each once. Of the `checked` names that end in
    another form than they came in, what comes is summed."""

    writes = True

    def __init__(self, announced: Announced, host: Host, checked: Iterable[str] = ()) -> None:
        self.plan, self.memory = announced.plan, announced.memory
        self.sizes = [size(b) for b in announced.buckets]
        self.told: dict[str, int] = {}  # the trainer's own checksums, where it broadcasts them
        self._begun: list[Summing] = []  # sums of the checked names
        self._checked = tuple(checked)
        self._forms: tuple[str, ...] = ()
        self._begin: Callable[[Collection[str]], Summing] | None = None
        self._announced = announced
        self._update = Update(host, announced.plan)
        self._next = 0
        computed = announced.plan.report.whole
        self.received: dict[str, int] = {n: 0 for n in self._checked if n in computed}
        # Names that are one tensor: sums of what comes, which say whether it is the same.
        self._tied = {s.name: 0 for pair in announced.plan.must_equal for s in pair}
        self._read = announced.plan.computed_names | self.received.keys() | self._tied.keys()

    def expect_sums(
        self, forms: tuple[str, ...], begin: Callable[[Collection[str]], Summing]
    ) -> None:
        """The trainer's, of the checked names in each of these forms, behind the last bucket; our
        own `begin` when those are written: of most names while the last buckets are on their way.
        """
        self._forms, self._begin = forms, begin
        if n := len(self._checked) * len(forms):
            self.sizes.append(n * SUM_BYTES)

    def expect(self, index: int) -> None:
        """Refuse any bucket but the next; wait until the trainer has filled its buffer."""
        a = self._announced
        if index != self._next or index >= len(a.buckets):
            raise RequestError(
                f"bucket {index} of {len(a.buckets)} came, {self._next} was expected",
                next_step="send buckets in order, each once",
            )
        if a.registrations:
            reg = a.registrations[index % len(a.memory)]
            a.importer.check_alive(reg.id)
            a.importer.wait(reg)

    @property
    def ahead(self) -> bool:
        """Whether the expected bucket may be copied before it is known to be here: no copy waits
        for the GPU then. Not the first one, whose loss leaves the old weights."""
        i = self._next
        return 0 < i < len(self._announced.buckets) and self._plain(i) is not None

    def _plain(self, index: int) -> Batch | None:
        """All that a bucket needs, where that is copies which were made before."""
        a = self._announced
        names = (p.spec.name for p in a.buckets[index])
        return a.batches.get(index) if self._read.isdisjoint(names) else None

    def receive(self) -> None:
        """Copy the expected bucket, or read what is behind the last."""
        a, index = self._announced, self._next
        self._next += 1
        if index == len(a.buckets):
            return self._read_sums(a.memory[index % len(a.memory)][: self.sizes[index]])
        self._copy(index)
        return None

    def sum(self) -> None:
        """After a bucket is copied and its buffer free: begin, near the end and there, the sums of
        the checked names that have come whole since the last time."""
        n = len(self._announced.buckets)
        if self._begin is None or self._next not in (n - EARLY, n) or len(self.sizes) == n:
            return
        since = n - EARLY if self._next == n > EARLY else -1
        ends = self._announced.ends
        names = [name for name in self._checked if since <= ends.get(name, -1) < self._next]
        self._begun.append(self._begin(names))

    @property
    def summing(self) -> Summing | None:
        """The sums of the checked names, where they were begun."""
        begun = self._begun
        return (lambda: {n: parts for s in begun for n, parts in s().items()}) if begun else None

    def _copy(self, index: int) -> None:
        a = self._announced
        if (batch := self._plain(index)) is not None:
            return self._update.repeat(a.buckets[index], batch)
        memory = a.memory[index % len(a.memory)]
        pieces = [(p, rows_in(memory, p)) for p in a.buckets[index]]
        batch = self._update.receive_pieces(pieces, a.batches.get(index))
        if all(rows.data_ptr() == memory.data_ptr() + p.offset for p, rows in pieces):
            a.batches[index] = batch  # the next one of this index lies where this one does
        for p, rows in pieces:
            for sums, seed in ((self.received, p.spec.name), (self._tied, "tied")):
                if p.spec.name in sums:
                    start = p.row * (rows.numel() // max(p.rows, 1))
                    have = sums[p.spec.name] + checksum_run(seed, rows, start)
                    sums[p.spec.name] = wrap(have)
        return None

    def _read_sums(self, data: torch.Tensor) -> None:
        """[checked names, forms] of int64: each name's in the form that it ends in here."""
        stored = self.plan.report.stored
        rows = data.cpu().view(torch.int64).view(-1, len(self._forms)).tolist()
        for name, row in zip(self._checked, rows, strict=True):
            if (form := stored.get(name, "")) not in self._forms:
                raise RequestError(
                    f"no checksum of its form {form or 'as it came'!r} was sent", where=name
                )
            self.told[name] = row[self._forms.index(form)]

    @property
    def complete(self) -> bool:
        return self._next == len(self.sizes)

    def finish(self) -> None:
        """Raises RequestError, or PlanError where two names of one tensor brought other values."""
        if not self.complete:
            raise RequestError(
                f"{len(self.sizes) - self._next} of {len(self.sizes)} buckets never came",
                next_step="send every bucket before finishing the update",
            )
        for a, b in self.plan.must_equal:
            if self._tied[a.name] != self._tied[b.name]:
                raise differ(a.name, b.name)
        self._update.finish()


def rows_in(buffer: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The rows of a tensor that lie in a packed buffer."""
    data = buffer[piece.offset : piece.offset + piece.nbytes]
    dtype: torch.dtype = getattr(torch, piece.spec.dtype)
    if piece.offset % dtype.itemsize:  # in vLLM's buckets, behind a tensor of smaller elements
        data = data.clone()
    return data.view(dtype).view(piece.shape)
