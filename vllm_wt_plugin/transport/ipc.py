"""Same-host sharing: `Exporter` in the trainer, `Importer` in every worker.

Exporter.register ─ Registration, once ─▶ Importer.open: views, kept by id
Exporter.refresh ─ before every push ─▶ Importer.check_alive and wait, then read the views
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch

from vllm_wt_plugin.errors import HandleError, UnknownRegistration
from vllm_wt_plugin.transport import cuda, memory, shm
from vllm_wt_plugin.transport.layout import BaseExporter, Export, Mapped, Place, Span, empty, view
from vllm_wt_plugin.wire.handles import (
    CudaStorage,
    LocalStorage,
    Registration,
    ShmStorage,
    Storage,
    TensorRef,
    TorchExport,
)

WAIT_S = 30.0


class Exporter(BaseExporter):
    """Trainer side. CPU storages are copied to shared memory by `refresh`, of each only the bytes
    between the first and the last that a tensor uses; CUDA storages are shared as they are.

    `refresh` records an event on the current stream of each GPU: call it where the weights
    were last written. They must not be written again until the push has returned. The memory of
    a shared CUDA storage is freed by `retire` or `close` at the earliest.
    Segments left by dead trainers of this user are removed when an exporter is made.
    """

    copied = frozenset({"cpu"})

    def __init__(self) -> None:
        super().__init__()
        self._fences: dict[torch.device, cuda.Fence] = {}
        shm.sweep_orphans()

    def _export(self, storage: torch.UntypedStorage, span: Span) -> Export:
        if storage.device.type == "cuda":
            return cuda.CudaExport(storage, span)
        return shm.Segment(storage, span)

    def _events(self, exports: Iterable[Place]) -> dict[str, bytes]:
        devices = {place.device for place in exports if place.device.type == "cuda"}
        for device in devices - self._fences.keys():
            self._fences[device] = cuda.Fence(device)
        return {self._fences[d].gpu_uuid: self._fences[d].handle for d in devices}

    def refresh(self) -> None:
        super().refresh()
        for device in {place.device for place in self._current}:
            if device in self._fences:
                self._fences[device].record()

    def close(self) -> None:
        super().close()
        self._fences.clear()


class LiveExporter(Exporter):
    """Worker side, for the bridge: shares live weights themselves, to be written by a trainer.

    CUDA memory as it is. CPU memory must have been given a shm segment for its `homes` first
    ({address: segment}); then nothing is copied either.
    """

    copied = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.homes: dict[int, shm.Home] = {}

    def _export(self, storage: torch.UntypedStorage, span: Span) -> Export:
        if storage.device.type == "cpu":
            home = self.homes.get(storage.data_ptr())
            if home is None:
                raise HandleError("this memory is in no shared segment", where=span.name)
            return home
        return super()._export(storage, span)

    def exports(self) -> dict[int, Export]:
        """What is shared now, by address."""
        return {place.address: export for place, export in self._current.items()}


@dataclass(frozen=True, slots=True)
class _Opened:
    registration: Registration
    mapped: tuple[Mapped, ...]
    tensors: dict[str, torch.Tensor]
    events: tuple[torch.cuda.Event, ...]
    allocations: cuda.Allocations


class Importer:
    """Worker side: opens registrations and keeps them by id until `close`. Not thread-safe.

    `device` is the worker's CUDA device, by default the current one when memory is first
    mapped; CPU and in-process tensors stay where they are. A context manager. `write`: what is
    written into the views of CPU memory shall reach its owner (CUDA memory is always shared).
    """

    def __init__(self, device: int | None = None, *, write: bool = False) -> None:
        self._device, self._write = device, write
        self._opened: dict[str, _Opened] = {}
        self._exports: Counter[TorchExport] = Counter()  # by how many registrations each is used

    @property
    def gpu(self) -> str:
        """The UUID of the worker's GPU; "" without one."""
        return cuda.gpu_uuid(self.device) if torch.cuda.is_available() else ""

    @property
    def device(self) -> int:
        if self._device is None:
            self._device = torch.cuda.current_device()
        return self._device

    def open(self, registration: Registration) -> dict[str, torch.Tensor]:
        """Views of every tensor by name, in order; the same dict while it stays open.

        They show the trainer's memory: read only, after `check_alive` and `wait`, and do not
        write. Raises RequestError, HandleError or TransferError naming the parameter; then
        nothing is kept.
        """
        known = self._opened.get(registration.id)
        if known is not None:
            if known.registration != registration:
                raise HandleError(
                    "this registration id is in use for other tensors",
                    next_step="register again: every registration has an id of its own",
                )
            return known.tensors
        registration.check()
        allocations = cuda.Allocations(registration.storages)
        mapped: dict[int, Mapped] = {}
        tensors: dict[str, torch.Tensor] = {}
        for ref in registration.tensors:
            storage = registration.storages[ref.storage]
            if 0 in ref.shape:  # torch gives such a tensor no memory, so there may be none
                tensors[ref.name] = self._empty(ref, storage)
                continue
            if ref.storage not in mapped:
                mapped[ref.storage] = self._attach(storage, allocations, ref.name)
            tensors[ref.name] = view(mapped[ref.storage], ref)
        events = self._open_events(registration)
        self._exports.update(_exports(registration))
        self._opened[registration.id] = _Opened(
            registration, tuple(mapped.values()), tensors, events, allocations
        )
        return tensors

    def _empty(self, ref: TensorRef, storage: Storage) -> torch.Tensor:
        gpu = isinstance(storage, CudaStorage)
        device = torch.device("cuda", self.device) if gpu else torch.device("cpu")
        return empty(ref, ref.shape, device)

    def _attach(self, storage: Storage, allocations: cuda.Allocations, name: str) -> Mapped:
        match storage:
            case ShmStorage():
                return shm.attach(storage, name, write=self._write)
            case CudaStorage():
                return allocations.attach(storage, self.device, name)
            case LocalStorage():
                return memory.attach(storage, name)

    def _open_events(self, registration: Registration) -> tuple[torch.cuda.Event, ...]:
        storages = [s for s in registration.storages if isinstance(s, CudaStorage)]
        used = {s.gpu_uuid for s in storages}
        events = {h: uuid for uuid, h in registration.events.items() if uuid in used}
        events |= {s.export.event: s.gpu_uuid for s in storages if s.export and s.export.event}
        return tuple(cuda.open_event(h, self.device, uuid) for h, uuid in events.items())

    def near(self, registration: Registration) -> bool:
        """Is its memory on this worker's own GPU?"""
        used = {s.gpu_uuid for s in registration.storages if isinstance(s, CudaStorage)}
        return bool(used) and used == {cuda.gpu_uuid(self.device)}

    def _get(self, registration_id: str) -> _Opened:
        try:
            return self._opened[registration_id]
        except KeyError:
            raise UnknownRegistration(
                "this worker does not hold these tensors",
                next_step="send the whole registration again",
            ) from None

    def check_alive(self, registration_id: str) -> None:
        """The trainer still shares this memory. Call before every read of CPU tensors.

        Raises UnknownRegistration, or HandleError for a segment that is gone, was replaced or
        has shrunk. CUDA memory stays mapped when its trainer ends and is not checked.
        """
        for mapped in self._get(registration_id).mapped:
            mapped.check()

    def wait_by_id(self, registration_id: str, seconds: float = WAIT_S) -> None:
        """As `wait`."""
        self.wait(self._get(registration_id).registration, seconds)

    def wait(self, registration: Registration, seconds: float = WAIT_S) -> None:
        """Block until the trainer's GPUs have done what came before its last `refresh`.

        At once for CPU tensors. Raises TransferError after `seconds`, UnknownRegistration.
        """
        for event in self._get(registration.id).events:
            cuda.wait(event, seconds)

    def mapped(self) -> dict[bytes, int]:
        """Every CUDA allocation of a trainer that is mapped here, by its handle: bytes."""
        return {h: n for o in self._opened.values() for h, n in o.allocations.sizes().items()}

    def close(self, registration_id: str | None = None) -> None:
        """Forget one registration, or all. Idempotent.

        Memory is unmapped when the last tensor on it is gone, the caller's included. Let GPU
        reads finish first.
        """
        for key in list(self._opened) if registration_id is None else [registration_id]:
            if (opened := self._opened.pop(key, None)) is None:
                continue
            exports = _exports(opened.registration)
            self._exports.subtract(exports)
            for export in [e for e in exports if not self._exports[e]]:
                del self._exports[export]
                cuda.release(export)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _exports(registration: Registration) -> set[TorchExport]:
    """What torch exported: a trainer of vLLM's exports its buffer once for many registrations."""
    storages = (s for s in registration.storages if isinstance(s, CudaStorage))
    return {s.export for s in storages if s.export is not None}
