"""Tensors as views of storages: how a trainer reads them and a worker rebuilds them.

tensors ─ read ─▶ rows + storages ─ BaseExporter.register ─▶ Registration ─ view ─▶ tensors
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, NamedTuple, Protocol, Self

import torch

from vllm_wt_plugin.errors import HandleError, RequestError, StateError
from vllm_wt_plugin.wire.handles import Registration, Storage, TensorRef, contiguous_stride
from vllm_wt_plugin.wire.params import ITEMSIZE, ParamSpec, check_specs, itemsize

ALIGN = 64  # bytes; every itemsize divides it, so a span may start at any multiple of it


class Place(NamedTuple):
    """Where one storage lies: its device, address and size in bytes."""

    device: torch.device
    address: int
    nbytes: int


NOWHERE = Place(torch.device("cpu"), 0, 0)  # stands for the memory of zero-element tensors


class Row(NamedTuple):
    """One tensor to share. `offset` and `stride` count elements; `stride` None: contiguous."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    offset: int
    place: Place

    @property
    def spec(self) -> ParamSpec:
        return ParamSpec(self.name, str(self.dtype).removeprefix("torch."), self.shape)

    @property
    def span(self) -> tuple[int, int]:
        """First byte and one past the last byte of the storage that the view touches."""
        strides = contiguous_stride(self.shape) if self.stride is None else self.stride
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        return self.offset * self.dtype.itemsize, (last + 1) * self.dtype.itemsize


class Span(NamedTuple):
    """Bytes [start, stop) of a storage; `name` is the first tensor that uses it."""

    start: int
    stop: int
    name: str


class Export(Protocol):
    """One storage as the trainer shares it; byte 0 of `handle` is byte `start` of the storage."""

    @property
    def handle(self) -> Storage: ...

    @property
    def start(self) -> int: ...

    def rebind(self, storage: torch.UntypedStorage) -> bool:
        """`storage` stands at the same place: share it from here on. False: export it anew."""

    def refresh(self) -> None:
        """Make the worker's end show the storage's present bytes."""

    def close(self) -> None:
        """Give the shared memory back. Idempotent."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """One storage as the worker sees it. The handle's byte 0 is byte `start` of `memory`."""

    memory: torch.UntypedStorage
    start: int
    check: Callable[[], object]  # raises HandleError when the memory is gone


def read(
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> tuple[list[Row], dict[Place, torch.UntypedStorage]]:
    """Rows and the distinct storages under them; equal rows mean that nothing moved.

    Gradients do not matter: only storages are read. Raises RequestError naming the parameter
    for whatever is not plain strided memory on the CPU or a CUDA device.
    """
    rows: list[Row] = []
    storages: dict[Place, torch.UntypedStorage] = {}
    for name, tensor in tensors:
        _check_kind(name, tensor)
        if tensor.numel() == 0:
            rows.append(Row(name, tensor.dtype, tuple(tensor.shape), None, 0, NOWHERE))
            continue
        storage = tensor.untyped_storage()
        place = Place(tensor.device, _address(name, tensor, storage), storage.nbytes())
        stride = None if tensor.is_contiguous() else tensor.stride()
        offset = int(tensor.storage_offset())
        rows.append(Row(name, tensor.dtype, tuple(tensor.shape), stride, offset, place))
        storages.setdefault(place, storage)
    if rows and not storages:
        storages[NOWHERE] = torch.empty(0, dtype=torch.uint8).untyped_storage()
    return rows, storages


def _check_kind(name: str, tensor: torch.Tensor) -> None:
    what = ""
    if tensor.layout != torch.strided:
        what = f"a {str(tensor.layout).removeprefix('torch.')} tensor"
    elif tensor.is_quantized:
        what = "a quantised tensor"
    elif tensor.is_conj() or tensor.is_neg():
        what = "a lazily conjugated or negated tensor"
    elif tensor.device.type not in ("cpu", "cuda"):
        what = f"a tensor on {tensor.device.type}"
    if what:
        raise RequestError(
            f"{what} cannot be shared",
            where=name,
            next_step="give a plain strided tensor on the CPU or a CUDA device",
        )


def _address(name: str, tensor: torch.Tensor, storage: torch.UntypedStorage) -> int:
    """The storage's address; refuses tensors that own no memory (DTensor, fake, freed by FSDP)."""
    try:
        address = storage.data_ptr() if storage.device == tensor.device else 0
    except RuntimeError:  # how torch answers for a wrapper subclass
        address = 0
    if address == 0:
        raise RequestError(
            f"this {type(tensor).__name__} has no memory of its own",
            where=name,
            next_step="give plain tensors: DTensor.to_local() or full_tensor(), or gather "
            "parameters whose storage was freed",
        )
    return address


def spans(rows: list[Row]) -> dict[Place, Span]:
    """The bytes that the rows touch in each storage, started at a multiple of `ALIGN`.

    Raises RequestError for a view that leaves its storage (torch allows it after `resize_`).
    """
    found: dict[Place, Span] = {}
    for row in rows:
        start, stop = (0, 0) if row.place == NOWHERE else row.span
        if stop > row.place.nbytes:
            raise RequestError(
                f"the view needs {stop} bytes, its storage has {row.place.nbytes}", where=row.name
            )
        start -= start % ALIGN
        if row.place not in found:
            found[row.place] = Span(start, stop, row.name)
            continue
        old = found[row.place]
        found[row.place] = Span(min(start, old.start), max(stop, old.stop), old.name)
    if len(found) > 1:
        found.pop(NOWHERE, None)  # zero-element tensors point at any storage
    return found


def flat(storage: torch.UntypedStorage, start: int, nbytes: int) -> torch.Tensor:
    """Bytes [start, start + nbytes) as uint8. The caller checks that the storage has them."""
    empty = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return empty.set_(storage, start, (nbytes,), (1,))


def view(mapped: Mapped, ref: TensorRef) -> torch.Tensor:
    """The tensor that `ref` describes, in the mapped memory; `Registration.check` came before."""
    size = itemsize(ref.dtype, ref.name)
    if mapped.start % size:
        raise HandleError(
            f"byte {mapped.start} of the memory is not aligned to {ref.dtype}", where=ref.name
        )
    tensor = empty(ref, (0,), mapped.memory.device)
    return tensor.set_(mapped.memory, mapped.start // size + ref.offset, ref.shape, ref.strides)


def empty(ref: TensorRef, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """A zero-element tensor of the reference's dtype; HandleError for a shape torch refuses."""
    try:
        return torch.empty(shape, dtype=getattr(torch, ref.dtype), device=device)
    except (AttributeError, RuntimeError) as exc:
        raise HandleError(
            f"this torch ({torch.__version__}) has no {ref.dtype} tensor of shape {shape}",
            where=ref.name,
        ) from exc


class BaseExporter(ABC):
    """Trainer side: keeps a table of exported storages and names it by a registration id.

    Two generations stay exported: the current registration's storages and those of the one
    before it, which a worker may still be reading. `retire()`, or the next registration that
    is new, releases the older. Not thread-safe. A context manager; `close()` frees everything.
    """

    copied: ClassVar[frozenset[str]] = frozenset()  # devices of which only the span is exported

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._registration: Registration | None = None
        self._current: dict[Place, Export] = {}
        self._previous: dict[Place, Export] = {}
        self._closed = False

    @abstractmethod
    def _export(self, storage: torch.UntypedStorage, span: Span) -> Export:
        """Share these bytes of the storage."""

    def _events(self, exports: Iterable[Place]) -> dict[str, bytes]:
        """Event handles for `Registration.events`, of the devices in `exports`."""
        return {}

    def register(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Registration, bool]:
        """The registration of these tensors, and whether it is new (the worker must be sent it).

        Same names, dtypes, shapes, strides and memory as last time: the same object, False.
        Anything else: a new id; storages exported already keep their handles. Moves no bytes:
        call `refresh` before every push. On an error nothing has changed.
        """
        if self._closed:
            raise StateError("this exporter is closed", next_step="make a new one")
        rows, storages = read(tensors)
        if (
            self._registration is not None
            and rows == self._rows
            and all(export.rebind(storages[place]) for place, export in self._current.items())
        ):
            return self._registration, False
        if not rows:
            raise RequestError("no tensors were given")
        specs = tuple(row.spec for row in rows)
        check_specs(specs)
        with ExitStack() as undo:
            exports = self._export_all(spans(rows), storages, undo)
            registration = self._describe(rows, specs, exports)
            undo.pop_all()
        self._rows, self._registration = rows, registration
        released, self._previous, self._current = self._previous, self._current, exports
        self._release(released)
        return registration, True

    def _export_all(
        self,
        wanted: dict[Place, Span],
        storages: dict[Place, torch.UntypedStorage],
        undo: ExitStack,
    ) -> dict[Place, Export]:
        exports: dict[Place, Export] = {}
        for place, touched in wanted.items():
            copied = place.device.type in self.copied
            span = touched if copied else Span(0, place.nbytes, touched.name)
            export = self._exported(place, span, storages[place])
            if export is None:
                export = self._export(storages[place], span)
                undo.callback(export.close)
            exports[place] = export
        return exports

    def _exported(self, place: Place, span: Span, storage: torch.UntypedStorage) -> Export | None:
        for generation in (self._current, self._previous):
            export = generation.get(place)
            if export is None or export.start != span.start:
                continue
            if export.handle.nbytes == span.stop - span.start and export.rebind(storage):
                return export
        return None

    def _describe(
        self, rows: list[Row], specs: tuple[ParamSpec, ...], exports: dict[Place, Export]
    ) -> Registration:
        index = {place: i for i, place in enumerate(exports)}
        refs = []
        for row, spec in zip(rows, specs, strict=True):
            start = 0 if row.place == NOWHERE else exports[row.place].start
            offset = row.offset - start // ITEMSIZE[spec.dtype]
            storage = index.get(row.place, 0)
            refs.append(TensorRef(row.name, spec.dtype, row.shape, storage, offset, row.stride))
        handles = tuple(export.handle for export in exports.values())
        return Registration(secrets.token_hex(16), handles, tuple(refs), self._events(exports))

    def _release(self, generation: dict[Place, Export]) -> None:
        kept = {id(e) for e in (*self._previous.values(), *self._current.values())}
        for export in generation.values():
            if id(export) not in kept:
                export.close()

    def refresh(self) -> None:
        """Show the registered tensors' present values to the worker; call before every push."""
        for export in self._current.values():
            export.refresh()

    def retire(self) -> None:
        """Every worker holds the current registration: release what only older ones used."""
        released, self._previous = self._previous, {}
        self._release(released)

    def close(self) -> None:
        """Release everything. Idempotent. Workers that mapped CPU memory keep their mapping."""
        self._closed = True
        self.forget()

    def forget(self) -> None:
        """Release everything; the next registration shares all of its memory anew."""
        self._registration = None
        released = (self._previous, self._current)
        self._previous, self._current = {}, {}
        for generation in released:
            self._release(generation)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
