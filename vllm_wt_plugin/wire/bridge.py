"""What the bridge's routes take and answer."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from vllm_wt_plugin.errors import StateError
from vllm_wt_plugin.wire.handles import Hex32, Registration, ShmStorage
from vllm_wt_plugin.wire.params import Owner, ParamSpec, Session, Version

CONFIG_FILE = "vllm_bridge_config.json"


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ExportBody(_Data, frozen=True):
    """`POST /bridge/export_cuda_ipc`: every checkpoint tensor the trainer will train (default:
    what the served checkpoint holds), and a segment whose lock it holds for as long as it is
    attached (default: until it is detached)."""

    specs: Annotated[tuple[ParamSpec, ...], msgspec.Meta(min_length=1, max_length=2**20)] | None = (
        None
    )
    presence: ShmStorage | None = None
    owner: Owner = ""


class NotifyBody(_Data, frozen=True):
    """`POST /bridge/notify_update`: the weights were written in place."""

    update_count: Annotated[int, msgspec.Meta(ge=0, le=2**62)]
    trainer_rank: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    timestamp: float = 0.0  # Unix time, seconds
    attached: Session = ""  # "": whoever attached last
    version: Version | None = None


class DetachBody(_Data, frozen=True):
    attached: Session = ""  # "": every trainer


class LiveTensor(_Data, frozen=True):
    """One of vLLM's own tensors. `share`: what torch's `_share_cuda_` gave, bytes as base64;
    for CPU memory the handle is the segment's name and the counter and event are empty."""

    dtype: str
    device: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int
    share: tuple[int, str, int, int, str, int, str, bool]


class Mapping(_Data, frozen=True):
    """Where a checkpoint tensor is: a view of one of vLLM's (`storage_offset`: of its storage)."""

    vllm_name: str
    dtype: str
    device: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int


class Exported(_Data, frozen=True):
    """What a worker tells of an export: the handles, and the same in words for the file."""

    attached: Hex32
    registration: Registration
    mappings: dict[str, Mapping]  # by checkpoint name
    tensors: dict[str, LiveTensor]  # by vLLM's name


def config_file(model: str, exported: Exported) -> dict[str, Any]:
    """`vllm_bridge_config.json`, in the shape that Atropos' trainer reads."""
    keys = ("device_index", "ipc_handle_b64", "storage_size", "storage_offset_orig",
            "ref_counter_handle_b64", "ref_counter_offset", "event_handle_b64",
            "event_sync_required")  # fmt: skip
    return {
        "model": model,
        "tp_degree": 1,
        "dp_shard_degree": 1,
        "param_names": list(exported.tensors),
        "param_mappings": {
            name: msgspec.to_builtins(m) | {"dtype": f"torch.{m.dtype}"}
            for name, m in exported.mappings.items()
        },
        "ipc_handles": {
            name: dict(zip(keys, t.share, strict=True))
            | {
                "dtype": f"torch.{t.dtype}",
                "tensor_storage_offset": t.storage_offset,
                "shape": t.shape,
                "stride": t.stride,
            }
            for name, t in exported.tensors.items()
        },
        "shared_weights_enabled": True,
        "single_copy_enabled": True,
        "num_params": len(exported.tensors),
    }


def refuse_sleep(*attached: dict[str, str]) -> None:
    """Raise while any rank has a trainer: `attached` is {id: owner} of each."""
    owners = sorted({owner for rank in attached for owner in rank.values()})
    if owners:
        raise StateError(
            f"sleep is refused: {', '.join(owners)} trains on these weights",
            next_step="close its bridge (or POST /bridge/detach), then sleep",
        )
