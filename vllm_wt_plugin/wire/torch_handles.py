"""CUDA tensors as `torch.multiprocessing.reductions.reduce_tensor` hands them on, read as data.

vLLM's own trainers send, for each tensor or for one packed buffer, a dict from GPU UUID to the
arguments of torch's `rebuild_cuda_tensor`; older ones to (function, arguments). No function is
called: the arguments say which part of which allocation holds the tensor, and that is all we take.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from vllm_wt_plugin.errors import HandleError, RequestError
from vllm_wt_plugin.wire.handles import (
    CudaStorage,
    Registration,
    Storage,
    TensorRef,
    contiguous_stride,
)
from vllm_wt_plugin.wire.params import ParamSpec, Shape, Size

INSECURE = "VLLM_ALLOW_INSECURE_SERIALIZATION"  # vLLM's own setting
MAX_GPUS = 64  # in one row of handles
IPC_HANDLE_BYTES = 64  # cudaIpcMemHandle_t and cudaIpcEventHandle_t alike
_ARGUMENTS = 15

# As torch gives them: class, size, stride, offset, storage class, dtype, device, handle, bytes,
# offset in bytes, requires_grad, counter, its slot, event, whether to wait for it.
_TAKEN = (1, 2, 3, 5, 7, 8, 9, 11, 12, 13, 14)


class _Reduced(msgspec.Struct, frozen=True, array_like=True):
    size: Shape
    stride: Shape
    offset: Size
    dtype: str
    handle: bytes | None
    nbytes: Annotated[int, msgspec.Meta(ge=0, le=2**48)]
    offset_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**48)]
    counter: Annotated[bytes, msgspec.Meta(max_length=128)]
    slot: int
    event: Annotated[bytes, msgspec.Meta(max_length=IPC_HANDLE_BYTES)]
    wait: bool

    def storage(self, gpu: str, name: str) -> CudaStorage:
        """Raises HandleError, RequestError."""
        if not self.nbytes:  # of an empty tensor, which torch gives no memory
            return CudaStorage(gpu, b"", 0, 0)
        export = {
            "counter": self.counter.decode("latin-1"),
            "slot": self.slot,
            "event": self.event if self.wait else b"",
        }
        given = {
            "kind": "cuda", "gpu_uuid": gpu, "handle": bare_handle(self.handle or b"", name),
            "nbytes": self.nbytes, "offset_bytes": self.offset_bytes, "export": export,
        }  # fmt: skip
        storage: CudaStorage = _convert(given, CudaStorage, name)
        return storage


def bare_handle(handle: bytes, name: str) -> bytes:
    """The cudaIpcMemHandle_t in torch's handle, which every torch version opens.

    torch puts a version byte and a kind in front; "e" (expandable segments) names file
    descriptors of the trainer instead and is refused.
    """
    if len(handle) == 2 + IPC_HANDLE_BYTES and handle[1:2] == b"c":
        return handle[2:]
    if len(handle) == IPC_HANDLE_BYTES:
        return handle
    raise RequestError(
        "CUDA cannot share this parameter's memory: it is in an expandable segment",
        where=name,
        next_step="unset PYTORCH_CUDA_ALLOC_CONF=expandable_segments in the trainer",
    )


def registrations(
    key: str, specs: Sequence[ParamSpec], handles: Any, sizes: Sequence[int] | None
) -> dict[str, Registration]:
    """What each GPU's worker shall open, by UUID.

    `handles`: one row {UUID: arguments} per tensor; with `sizes` (bytes of each tensor) one row, of
    the buffer in which the tensors lie end to end. Raises RequestError or HandleError.
    """
    rows = [handles] if sizes is not None else handles
    wanted = len(specs) if sizes is None else 1
    if not isinstance(rows, list | tuple) or len(rows) != wanted:
        got = len(rows) if isinstance(rows, list | tuple) else type(rows).__name__
        raise RequestError(
            f"`ipc_handles` should be of the same size as `names`: got {got} and {wanted}",
            where="$.update_info.ipc_handles",
            next_step="send one dict per name, or `tensor_sizes` with the dict of one buffer",
        )
    gpus = _gpus(rows)
    make = _tensor_by_tensor if sizes is None else _packed
    found = {gpu: Registration(key, *make(gpu, specs, rows, sizes or ())) for gpu in gpus}
    for registration in found.values():
        registration.check()
    return found


def _gpus(rows: Sequence[Any]) -> list[str]:
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not 0 < len(row) <= MAX_GPUS:
            raise HandleError(
                "the handles of a tensor are a dict from GPU UUID to torch's arguments",
                where=f"$.update_info.ipc_handles[{i}]",
            )
        if row.keys() != rows[0].keys():
            raise HandleError(
                f"not every tensor comes from the same GPUs: {sorted(map(str, row))} "
                f"and {sorted(map(str, rows[0]))}",
                where=f"$.update_info.ipc_handles[{i}]",
                next_step="have every trainer rank export every tensor",
            )
    return list(rows[0]) if rows else []


Table = tuple[tuple[Storage, ...], tuple[TensorRef, ...]]


def _tensor_by_tensor(
    gpu: str, specs: Sequence[ParamSpec], rows: Sequence[Any], _: Sequence[int]
) -> Table:
    storages, refs = [], []
    for i, (spec, row) in enumerate(zip(specs, rows, strict=True)):
        reduced = _read(row[gpu], spec.name)
        if (reduced.dtype, reduced.size) != (spec.dtype, spec.shape):
            raise HandleError(
                f"the handle is of a {reduced.dtype} tensor {reduced.size}, "
                f"announced is {spec.dtype} {spec.shape}",
                where=spec.name,
            )
        storages.append(reduced.storage(gpu, spec.name))
        refs.append(TensorRef(*_fields(spec), i, reduced.offset, reduced.stride))
    return tuple(storages), tuple(refs)


def _packed(
    gpu: str, specs: Sequence[ParamSpec], rows: Sequence[Any], sizes: Sequence[int]
) -> Table:
    if len(sizes) != len(specs):
        raise RequestError(
            f"`tensor_sizes` should be of the same size as `names`: got {len(sizes)} "
            f"and {len(specs)}",
            where="$.update_info.tensor_sizes",
        )
    buffer = _read(rows[0][gpu], "the packed buffer")
    if buffer.dtype != "uint8" or buffer.stride != contiguous_stride(buffer.size):
        raise HandleError("the packed buffer is not contiguous uint8", where="ipc_handles")
    refs, at = [], buffer.offset
    for spec, size in zip(specs, sizes, strict=True):
        if size != spec.nbytes:
            raise HandleError(
                f"`tensor_sizes` says {size} bytes, {spec.dtype} {spec.shape} has {spec.nbytes}",
                where=spec.name,
            )
        width = spec.nbytes // spec.numel if spec.numel else 1
        if at % width:
            raise HandleError(
                f"it starts at byte {at} of the buffer, which no {spec.dtype} can",
                where=spec.name,
                next_step="send tensors of one dtype, or packed=False",
            )
        refs.append(TensorRef(*_fields(spec), 0, at // width))
        at += size
    return (buffer.storage(gpu, "the packed buffer"),), tuple(refs)


def _fields(spec: ParamSpec) -> tuple[str, str, Shape]:
    return spec.name, spec.dtype, spec.shape


def _read(value: Any, name: str) -> _Reduced:
    """`value`: torch's arguments, or (function, arguments)."""
    if isinstance(value, list | tuple) and len(value) == 2:
        value = value[1]
    if not isinstance(value, list | tuple) or len(value) != _ARGUMENTS:
        raise HandleError(
            "these are not the arguments of torch's rebuild_cuda_tensor",
            where=name,
            next_step="send CUDA tensors; for tensors in host memory use WeightSync",
        )
    taken = [value[i] for i in _TAKEN]
    taken[0], taken[1] = (tuple(v) if isinstance(v, tuple) else v for v in taken[:2])
    taken[3] = str(taken[3]).removeprefix("torch.")
    reduced: _Reduced = _convert(taken, _Reduced, name)
    return reduced


def _convert(data: Any, kind: Any, name: str) -> Any:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as exc:
        raise HandleError(f"a handle that torch does not make: {exc}", where=name) from exc


def unpickled(text: str) -> Any:
    """What vLLM's HTTP client pickled, where vLLM's setting allows it. Raises RequestError."""
    if os.environ.get(INSECURE, "0") in ("", "0"):
        raise RequestError(
            f"refusing `ipc_handles_pickled` without {INSECURE}=1",
            where="$.update_info.ipc_handles_pickled",
            next_step=f"set {INSECURE}=1 on the server (vLLM's HTTP client pickles CUDA handles), "
            "or push with WeightSync, which needs no pickle",
        )
    from vllm_wt_plugin.wire import pickled

    return pickled.read(text)
