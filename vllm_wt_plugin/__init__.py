"""Live weight sync for vLLM, as a plugin.

    trainer tensor → trainer/source → transport/ipc (handles, no copies on a GPU)
        ⇢ worker/session → worker/plan → live vLLM parameter
    control beside it: trainer/client → server/routes → worker/session

A trainer imports this package without vLLM. In vLLM it is loaded by the entry points named `wt`.
"""

import importlib

from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge
from vllm_wt_plugin.errors import (
    AccessDenied,
    EngineAsleep,
    EngineDirty,
    HandleError,
    NotBegun,
    NotJoined,
    NoUpdate,
    PlanError,
    RequestError,
    ServerUnreachable,
    StateError,
    TransferError,
    UnknownRegistration,
    UnsupportedVLLM,
    UpdateInProgress,
    VersionMismatch,
    WeightSyncError,
)
from vllm_wt_plugin.sparse.patch import SparseWeightPatch
from vllm_wt_plugin.trainer.report import PushReport, ReplicaOutcome
from vllm_wt_plugin.trainer.source import Source, as_source
from vllm_wt_plugin.trainer.sync import WeightSync

__all__ = [
    "AccessDenied",
    "BridgeConfig",
    "EngineAsleep",
    "EngineDirty",
    "HandleError",
    "IPCTrainerSendWeightsArgs",
    "IPCWeightTransferEngine",
    "IPCWeightTransferInitInfo",
    "IPCWeightTransferUpdateInfo",
    "NCCLTrainerSendWeightsArgs",
    "NCCLWeightTransferEngine",
    "NCCLWeightTransferInitInfo",
    "NCCLWeightTransferUpdateInfo",
    "NoUpdate",
    "NotBegun",
    "NotJoined",
    "PlanError",
    "PushReport",
    "ReplicaOutcome",
    "RequestError",
    "ServerUnreachable",
    "Source",
    "SparseWeightPatch",
    "StateError",
    "TransferError",
    "UnknownRegistration",
    "UnsupportedVLLM",
    "UpdateInProgress",
    "VLLMWeightBridge",
    "VersionMismatch",
    "WeightSync",
    "WeightSyncError",
    "WeightTransferEngine",
    "WeightTransferInitRequest",
    "WeightTransferUpdateRequest",
    "as_source",
]

# vLLM's engine API (`compat/`), by the module of each name: loaded when it is first asked for.
_COMPAT = {
    "engine": ("WeightTransferEngine",),
    "ipc": ("IPCWeightTransferEngine",),
    "nccl": ("NCCLWeightTransferEngine",),
    "info": (
        "IPCTrainerSendWeightsArgs",
        "IPCWeightTransferInitInfo",
        "IPCWeightTransferUpdateInfo",
        "NCCLTrainerSendWeightsArgs",
        "NCCLWeightTransferInitInfo",
        "NCCLWeightTransferUpdateInfo",
        "WeightTransferInitRequest",
        "WeightTransferUpdateRequest",
    ),
}


def __getattr__(name: str) -> object:
    for module, names in _COMPAT.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.compat.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
