"""Patches as one update call: their tensors shared by an exporter, named in an `UpdateInfo`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.transport.layout import BaseExporter
from vllm_wt_plugin.wire.patches import INDICES, MAX_INT32, VALUES
from vllm_wt_plugin.wire.update import UpdateInfo


class Patch(Protocol):
    """`sparse/patch.py: SparseWeightPatch`, or vLLM's with a `full_shape`."""

    @property
    def name(self) -> str: ...
    @property
    def indices(self) -> torch.Tensor: ...
    @property
    def values(self) -> torch.Tensor: ...
    @property
    def full_shape(self) -> tuple[int, ...] | None: ...
    def check(self) -> None: ...


def share(patches: Iterable[Patch], exporter: BaseExporter) -> UpdateInfo:
    """What `update_weights` takes to apply these, while `exporter` holds them. Blocking: what the
    tensors' GPUs were given before is done on return. Raises RequestError naming the parameter."""
    given = list(patches)
    if not given:
        raise RequestError("no patches were given", next_step="name at least one tensor")
    shapes = [_shape(p) for p in given]
    tensors = []
    for p, shape in zip(given, shapes, strict=True):
        narrow = torch.Size(shape).numel() <= MAX_INT32
        indices = p.indices.to(torch.int32 if narrow else torch.int64)
        tensors += [(INDICES + p.name, indices), (VALUES + p.name, p.values)]
    registration, _ = exporter.register(tensors)
    exporter.refresh()
    for device in {t.device for _, t in tensors if t.is_cuda}:
        torch.cuda.synchronize(device)
    return UpdateInfo(
        names=[p.name for p in given],
        dtype_names=[str(p.values.dtype).removeprefix("torch.") for p in given],
        shapes=shapes,
        update_kind="sparse_flat",
        num_updates_list=[p.values.numel() for p in given],
        storages=list(registration.storages),
        handles=[(r.storage, r.offset, r.stride) for r in registration.tensors],
    )


def _shape(p: Patch) -> tuple[int, ...]:
    p.check()
    if p.full_shape is None:
        raise RequestError(
            "a patch that is sent needs its `full_shape`", where=p.name,
            next_step="give the shape of the whole checkpoint tensor",
        )  # fmt: skip
    return tuple(p.full_shape)
