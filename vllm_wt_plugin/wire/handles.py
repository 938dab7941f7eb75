"""Tensor handles as data: which memory, which part of it. Plain JSON, never a pickle.

A storage is exported once and named by many tensors; a `Registration` is the whole table, sent
once, kept by the worker, and named by its id in every later push.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from vllm_wt_plugin.errors import HandleError
from vllm_wt_plugin.wire.params import Name, ParamSpec, Shape, Size, check_specs, itemsize

SHM_PREFIX = "/wt_"
Hex32 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
ShmName = Annotated[str, msgspec.Meta(pattern=r"^/wt_[0-9a-f]{32}\Z")]
ByteCount = Annotated[int, msgspec.Meta(ge=0, le=2**48)]


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ShmStorage(_Data, frozen=True, tag="shm", tag_field="kind"):
    """A POSIX shared-memory segment of the same user on the same host."""

    name: ShmName
    nbytes: ByteCount


class TorchExport(_Data, frozen=True):
    """What comes with memory that torch itself exported: where the trainer counts who still uses
    it (one worker takes one off, once), and the event after which it may be read (b"": at once)."""

    counter: Annotated[str, msgspec.Meta(pattern=r"^/torch_[0-9]+_[0-9]+_[0-9]+\Z", max_length=128)]
    slot: Annotated[int, msgspec.Meta(ge=0, le=9_999)]  # in a file of torch's
    event: Annotated[bytes, msgspec.Meta(max_length=64)] = b""


class CudaStorage(_Data, frozen=True, tag="cuda", tag_field="kind"):
    """A part of a CUDA allocation: its bare cudaIpcMemHandle_t (base64 on the wire)."""

    gpu_uuid: Annotated[str, msgspec.Meta(max_length=64)]
    handle: Annotated[bytes, msgspec.Meta(max_length=1024)]
    nbytes: ByteCount
    offset_bytes: ByteCount
    export: TorchExport | None = None


class LocalStorage(_Data, frozen=True, tag="local", tag_field="kind"):
    """Memory of this very process (`transport/memory.py`)."""

    pid: int
    key: Hex32
    nbytes: ByteCount


Storage = ShmStorage | CudaStorage | LocalStorage


class TensorRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A strided view into `storages[storage]`; offset and stride count elements."""

    name: Name
    dtype: str
    shape: Shape
    storage: Annotated[int, msgspec.Meta(ge=0, le=2**24)]
    offset: Size
    stride: Shape | None = None  # None: contiguous

    @property
    def spec(self) -> ParamSpec:
        return ParamSpec(self.name, self.dtype, self.shape)

    @property
    def strides(self) -> tuple[int, ...]:
        return contiguous_stride(self.shape) if self.stride is None else self.stride


class Registration(_Data, frozen=True):
    """Every tensor of a trainer. `tensors[i].storage` indexes `storages`."""

    id: Hex32
    storages: Annotated[tuple[Storage, ...], msgspec.Meta(max_length=2**20)]
    tensors: Annotated[tuple[TensorRef, ...], msgspec.Meta(min_length=1, max_length=2**20)]
    # An inter-process CUDA event the trainer records before each push: UUID → handle.
    events: dict[str, bytes] = {}

    @property
    def specs(self) -> tuple[ParamSpec, ...]:
        return tuple(t.spec for t in self.tensors)

    def check(self) -> None:
        """Refuse duplicate names, unknown dtypes, and views that leave their storage."""
        check_specs(self.specs)
        for t in self.tensors:
            if t.storage >= len(self.storages):
                raise HandleError(
                    f"storage {t.storage} of {len(self.storages)} does not exist", where=t.name
                )
            if len(t.strides) != len(t.shape):
                raise HandleError(f"stride {t.stride} does not fit {t.shape}", where=t.name)
            if t.spec.numel == 0:
                continue
            last = t.offset + sum((n - 1) * s for n, s in zip(t.shape, t.strides, strict=True))
            need = (last + 1) * itemsize(t.dtype, t.name)
            have = self.storages[t.storage].nbytes
            if need > have:
                raise HandleError(
                    f"the view needs {need} bytes, its storage has {have}", where=t.name
                )


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements: (2, 3) → (3, 1)."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))
