"""Live weight sync for vLLM, as a plugin.

    trainer tensor → trainer/source → transport/ipc (handles, no copies on a GPU)
        ⇢ worker/session → worker/plan → live vLLM parameter
    control beside it: trainer/client → server/routes → worker/session

A trainer imports this package without vLLM. In vLLM it is loaded by the entry points named `wt`.
"""

from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge
from vllm_wt_plugin.errors import (
    AccessDenied,
    EngineAsleep,
    EngineDirty,
    HandleError,
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
from vllm_wt_plugin.trainer.report import PushReport, ReplicaOutcome
from vllm_wt_plugin.trainer.source import Source, as_source
from vllm_wt_plugin.trainer.sync import WeightSync

__all__ = [
    "AccessDenied",
    "BridgeConfig",
    "EngineAsleep",
    "EngineDirty",
    "HandleError",
    "NoUpdate",
    "NotJoined",
    "PlanError",
    "PushReport",
    "ReplicaOutcome",
    "RequestError",
    "ServerUnreachable",
    "Source",
    "StateError",
    "TransferError",
    "UnknownRegistration",
    "UnsupportedVLLM",
    "UpdateInProgress",
    "VLLMWeightBridge",
    "VersionMismatch",
    "WeightSync",
    "WeightSyncError",
    "as_source",
]
