"""The dataclasses of the engine API: what is said at init, at an update, and by a trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire.torch_handles import unpickled

BUFFER_BYTES = 1 << 30
BUFFERS = 2
KINDS = ("dense", "sparse_flat")

# {GPU UUID: arguments of torch's rebuild_cuda_tensor, or (function, arguments)}
Handle = dict[str, tuple[Callable[..., Any], tuple[Any, ...]] | tuple[Any, ...]]


@dataclass
class WeightTransferInitRequest:
    """What `LLM.init_weight_transfer_engine` takes; `init_info` is the backend's."""

    init_info: dict[str, Any] = field(default_factory=dict)


@dataclass
class WeightTransferUpdateRequest:
    """What `LLM.update_weights` takes; a list has one for each worker, by global rank."""

    update_info: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)


@dataclass
class WeightTransferInitInfo:
    """Base of what a backend is told once."""


@dataclass
class WeightTransferUpdateInfo:
    """Base of what a backend is told at each update: lists of one entry per tensor."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    def __post_init__(self) -> None:
        for what in ("dtype_names", "shapes"):
            _check_size(what, len(getattr(self, what)), len(self.names))


def _check_size(what: str, size: int, names: int) -> None:
    if size != names:
        raise ValueError(f"`{what}` should be of the same size as `names`: got {size} and {names}")


@dataclass(kw_only=True)
class _Kind:
    update_kind: str = "dense"
    num_updates_list: list[int] | None = None  # of a sparse update: changed elements per tensor

    def check_kind(self, names: int) -> None:
        counts = self.num_updates_list
        if self.update_kind not in KINDS:
            raise ValueError(f"update_kind must be one of {KINDS}, got {self.update_kind!r}")
        if self.update_kind == "dense":
            if counts is not None:
                raise ValueError("`num_updates_list` is for sparse updates only")
            return
        if not counts:
            missing = "missing" if counts is None else "empty"
            raise ValueError(f"`num_updates_list` is {missing}: a sparse update needs it")
        _check_size("num_updates_list", len(counts), names)
        if any(not isinstance(n, int) or n < 0 for n in counts):
            raise ValueError("`num_updates_list` has an entry that is not a count, or is negative")


@dataclass
class IPCWeightTransferInitInfo(WeightTransferInitInfo):
    """No rendezvous is needed; an update that is packed says so itself."""

    packed: bool = False


@dataclass
class IPCWeightTransferUpdateInfo(_Kind, WeightTransferUpdateInfo):
    """Exactly one of: `ipc_handles`, the same pickled (read as data, where vLLM's flag allows it),
    or ours, `handles` into `storages`. `tensor_sizes`, in bytes: one buffer holds all tensors."""

    ipc_handles: list[Handle] | Handle | None = None
    ipc_handles_pickled: str | None = None
    tensor_sizes: list[int] | None = None
    packed: bool = False
    storages: list[Any] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kind(len(self.names))
        if self.ipc_handles_pickled is not None:
            if self.ipc_handles is not None:
                raise ValueError("Cannot specify both `ipc_handles` and `ipc_handles_pickled`")
            try:
                self.ipc_handles = unpickled(self.ipc_handles_pickled)
            except RequestError as exc:
                raise ValueError(str(exc)) from exc
            self.ipc_handles_pickled = None
        if self.ipc_handles is None and not self.handles:
            raise ValueError("Either `ipc_handles` or `ipc_handles_pickled` must be provided")
        if isinstance(self.ipc_handles, list):
            _check_size("ipc_handles", len(self.ipc_handles), len(self.names))


@dataclass
class NCCLWeightTransferInitInfo(WeightTransferInitInfo):
    """Where to meet: an address, or between GPUs the id of a trainer without torch. A worker's
    rank in the group is `rank_offset` + its global rank. `packed` and its buffers: of every
    update that does not say so itself."""

    master_address: str | None
    master_port: int | None
    rank_offset: int
    world_size: int
    nccl_unique_id_b64: str | None = field(default=None, repr=False)
    packed: bool = False
    packed_buffer_size_bytes: int = BUFFER_BYTES
    packed_num_buffers: int = BUFFERS

    def __post_init__(self) -> None:
        where = self.master_address is not None, self.master_port is not None
        if where != (self.nccl_unique_id_b64 is None,) * 2:
            raise ValueError("give master_address and master_port, or nccl_unique_id_b64, not both")


@dataclass
class NCCLWeightTransferUpdateInfo(_Kind, WeightTransferUpdateInfo):
    """`packed`: through `packed_num_buffers` buffers of that many bytes; both sides must agree."""

    packed: bool = False
    packed_buffer_size_bytes: int = BUFFER_BYTES
    packed_num_buffers: int = BUFFERS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_kind(len(self.names))


@dataclass
class NCCLTrainerSendWeightsArgs:
    """`group`: what `trainer_init` returned. `packed`: many tensors in one broadcast of about
    `packed_buffer_size_bytes`; the workers must be told the same. `stream`: on which to send,
    else the current one. `post_iter_func`: the tensor to send of an item of the iterator."""

    group: Any
    src: int = 0
    post_iter_func: Callable[[tuple[str, torch.Tensor]], torch.Tensor] | None = None
    packed: bool = False
    stream: torch.cuda.Stream | None = None
    packed_buffer_size_bytes: int = BUFFER_BYTES
    packed_num_buffers: int = BUFFERS

    def __post_init__(self) -> None:
        if self.group is None:
            raise ValueError("group is required: what trainer_init returned")
        if self.src != 0:
            raise ValueError(f"src must be 0, the trainer's rank, got {self.src}")
        if min(self.packed_buffer_size_bytes, self.packed_num_buffers) <= 0:
            raise ValueError(
                "packed_buffer_size_bytes and packed_num_buffers must be positive, got "
                f"{self.packed_buffer_size_bytes} and {self.packed_num_buffers}"
            )


@dataclass
class IPCTrainerSendWeightsArgs:
    """Where a trainer sends to: `mode` (or `send_mode`) `http` with `url`, or `ray` with a handle
    (or several) of an `LLM` actor. `packed`: through one buffer of at most that many bytes."""

    mode: str | None = None
    llm_handle: Any = None
    url: str | None = None
    send_mode: str | None = None
    packed: bool = False
    packed_buffer_size_bytes: int = BUFFER_BYTES

    def __post_init__(self) -> None:
        if None not in (self.mode, self.send_mode) and self.mode != self.send_mode:
            raise ValueError(f"mode is {self.mode!r} and send_mode is {self.send_mode!r}")
        self.mode = self.send_mode = self.mode if self.send_mode is None else self.send_mode
        if self.mode not in ("ray", "http"):
            raise ValueError(f"mode must be 'ray' or 'http', got {self.mode}")
        if self.mode == "ray" and self.llm_handle is None:
            raise ValueError("llm_handle is required for 'ray' mode")
        if self.mode == "http" and self.url is None:
            raise ValueError("url is required for 'http' mode")
        if self.packed_buffer_size_bytes <= 0:
            raise ValueError(
                f"packed_buffer_size_bytes must be positive, got {self.packed_buffer_size_bytes}"
            )
