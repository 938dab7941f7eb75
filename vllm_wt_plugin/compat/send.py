"""The trainer's half of the ipc engine: a part of the open update, over HTTP or to Ray actors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import torch

from vllm_wt_plugin.compat.info import IPCTrainerSendWeightsArgs
from vllm_wt_plugin.sparse.patch import SparseWeightPatch
from vllm_wt_plugin.trainer import patching
from vllm_wt_plugin.trainer.client import HTTPClient
from vllm_wt_plugin.transport.ipc import Exporter
from vllm_wt_plugin.wire.buckets import ALIGN

Named = tuple[str, torch.Tensor]


def send(tensors: Iterable[Named], args: IPCTrainerSendWeightsArgs) -> None:
    """Blocks until the workers have copied. Called on every rank of a distributed trainer, all of
    which iterate; the first one sends. Raises WeightSyncError (HTTP) or what Ray raises."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank() != 0:
        for _ in tensors:
            pass
        return
    with Exporter() as exporter:
        for chunk in _packed(tensors, args) if args.packed else [list(tensors)]:
            detached = [(name, t.detach()) for name, t in chunk]
            registration, _ = exporter.register(detached)
            exporter.refresh()
            _post({"update_info": _update_info(msgspec.to_builtins(registration))}, args)


def send_patches(patches: Iterable[SparseWeightPatch], args: IPCTrainerSendWeightsArgs) -> None:
    """The same for patches with a `full_shape`; raises what is wrong with one, naming it. Called
    on one rank."""
    if args.packed:
        raise ValueError("patches are not packed: leave out `packed`")
    patching.send_patches(lambda info: _post({"update_info": info}, args), patches)


def _update_info(table: dict[str, Any]) -> dict[str, Any]:
    rows = [(*row, None)[:6] for row in table["tensors"]]
    names, dtypes, shapes, *_ = map(list, zip(*rows, strict=True))
    return {
        "names": names, "dtype_names": dtypes, "shapes": [list(s) for s in shapes],
        "storages": table["storages"], "handles": [list(row[3:]) for row in rows],
    }  # fmt: skip


def _post(request: dict[str, Any], args: IPCTrainerSendWeightsArgs) -> None:
    if args.mode == "http":
        client = HTTPClient(str(args.url), token=os.environ.get("WT_TOKEN"))
        try:
            client.post("/update_weights", request)
        finally:
            client.close()
        return
    import ray

    handles = args.llm_handle if isinstance(args.llm_handle, list) else [args.llm_handle]
    ray.get([handle.update_weights.remote(request) for handle in handles])


def _packed(tensors: Iterable[Named], args: IPCTrainerSendWeightsArgs) -> Iterator[list[Named]]:
    """Copies in one buffer, which holds the next chunk once the one before was taken."""
    size = args.packed_buffer_size_bytes
    buffer = torch.empty(0, dtype=torch.uint8)
    chunk: list[Named] = []
    used = 0
    for name, tensor in tensors:
        if tensor.nbytes > size:
            raise ValueError(
                f"Tensor '{name}' has size {tensor.nbytes} bytes, which exceeds "
                f"packed_buffer_size_bytes={size}. Increase it to at least {tensor.nbytes}."
            )
        if used + tensor.nbytes > size:
            yield chunk
            chunk, used = [], 0
        if not buffer.numel():
            buffer = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        place = buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        chunk.append((name, place.copy_(tensor.detach())))
        used += -(-tensor.nbytes // ALIGN) * ALIGN
    if chunk:
        yield chunk
