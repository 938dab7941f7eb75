"""What one update call brings: vLLM's fields, the older form of them, and ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire import torch_handles
from vllm_wt_plugin.wire.handles import Registration, Storage, TensorRef
from vllm_wt_plugin.wire.nccl import PackedBuffers, PackedBytes
from vllm_wt_plugin.wire.params import Name, ParamSpec, Shape, Size, Version
from vllm_wt_plugin.wire.patches import Checksum


class UpdateInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One update call: vLLM's fields (0.32/0.33), the older form, and ours (`storages`, `handles`).

    `handles[i]` is a view (storage, offset, stride) of `storages`, for `names[i]`. In vLLM's form
    `ipc_handles` are torch's own (`wire/torch_handles.py`), packed where there are `tensor_sizes`.
    Sparse (`wire/sparse.py`): two handles for each name, its `num_updates_list[i]` indices and as
    many values; `base_version` and `sums` as in `PatchPush`.
    """

    names: Annotated[list[Name], msgspec.Meta(max_length=2**20)] = []
    dtype_names: list[str] = []
    shapes: list[Shape] = []
    update_kind: Literal["dense", "sparse_flat"] = "dense"
    packed: bool = False
    packed_buffer_size_bytes: PackedBytes | None = None  # the older form, of what is broadcast
    packed_num_buffers: PackedBuffers | None = None
    bucket: Annotated[int, msgspec.Meta(ge=0, le=2**40)] | None = None  # of an announced update
    broadcast: bool = False  # all buckets of an announced update come through its group
    storages: list[Storage] = []
    handles: list[tuple[Size, Size, Shape | None]] = []
    ipc_handles: Any = None
    ipc_handles_pickled: str | None = None
    tensor_sizes: list[Size] | None = None
    num_updates_list: list[Size] | None = None
    base_version: Version | None = None
    sums: list[Checksum] = []

    @property
    def specs(self) -> tuple[ParamSpec, ...]:
        """Raises RequestError where the lists do not fit together."""
        self.check_sizes("dtype_names", "shapes")
        if not self.names:
            raise RequestError("`names` is empty", where="$.update_info.names")
        rows = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return tuple(ParamSpec(n, d, s) for n, d, s in rows)

    def check_sizes(self, *fields: str) -> None:
        """As many of each as there are names."""
        for what in fields:
            if (size := len(getattr(self, what))) != len(self.names):
                raise RequestError(
                    f"`{what}` should be of the same size as `names`: "
                    f"got {size} and {len(self.names)}",
                    where=f"$.update_info.{what}",
                )

    @property
    def only_names(self) -> bool:
        """Whether it hands over no memory: its tensors come in another way."""
        memory = self.storages or self.handles or self.ipc_handles or self.ipc_handles_pickled
        return not memory and self.bucket is None

    def check_dense(self) -> None:
        if self.num_updates_list is not None:
            raise RequestError(
                "`num_updates_list` is for sparse updates",
                where="$.update_info.num_updates_list",
                next_step='say update_kind "sparse_flat", or leave it out',
            )

    def registrations(self, key: str) -> dict[str, Registration]:
        """What a worker shall open, by the UUID of its GPU, or one under "" for every worker.

        Raises RequestError. Reading a pickle may take a second.
        """
        if self.update_kind != "dense":
            raise RequestError(
                "patches come in one update_info for all workers, not in a list",
                next_step="send one, or push patches with WeightSync",
            )
        self.check_dense()
        if self.ipc_handles_pickled is not None:
            return self.unpickled().registrations(key)
        if self.packed and self.tensor_sizes is None:
            raise RequestError(
                "`tensor_sizes` is required when packed=True",
                where="$.update_info.tensor_sizes",
                next_step="send the bytes of each tensor, or leave out packed",
            )
        if self.ipc_handles is None:
            return {"": self.registration(key)}
        return torch_handles.registrations(key, self.specs, self.ipc_handles, self.tensor_sizes)

    def unpickled(self) -> UpdateInfo:
        """With `ipc_handles` instead of `ipc_handles_pickled`. Raises RequestError."""
        if self.ipc_handles_pickled is None:
            return self
        if self.ipc_handles is not None:
            raise RequestError("Cannot specify both `ipc_handles` and `ipc_handles_pickled`")
        handles = torch_handles.unpickled(self.ipc_handles_pickled)
        return msgspec.structs.replace(self, ipc_handles=handles, ipc_handles_pickled=None)

    def registration(self, key: str) -> Registration:
        """Plain `storages` and `handles` as a `Registration`, checked; raises RequestError."""
        self.check_sizes("handles")
        refs = tuple(
            TensorRef(s.name, s.dtype, s.shape, h[0], h[1], h[2])
            for s, h in zip(self.specs, self.handles, strict=True)
        )
        registration = Registration(key, tuple(self.storages), refs)
        registration.check()
        return registration
