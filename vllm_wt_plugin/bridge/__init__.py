"""Train on vLLM's own weights: one copy of the model, the optimiser's step is the update.

VLLMWeightBridge.get_trainable_model ─ POST /bridge/export_cuda_ipc ─▶ worker/export: views by plan
with bridge.update(version): optimizer.step() ─ pause … commit, caches, resume ─▶ worker/session
"""

from vllm_wt_plugin.bridge.bridge import VLLMWeightBridge, create_bridge_from_training_config
from vllm_wt_plugin.bridge.config import BridgeConfig
from vllm_wt_plugin.bridge.group import broadcast_object_list, init_process_group
from vllm_wt_plugin.bridge.helpers import (
    get_inference_urls,
    get_local_hostname,
    get_name_conversions,
    permute_for_rotary,
    permute_for_rotary_1d,
)

__all__ = [
    "BridgeConfig",
    "VLLMWeightBridge",
    "broadcast_object_list",
    "create_bridge_from_training_config",
    "get_inference_urls",
    "get_local_hostname",
    "get_name_conversions",
    "init_process_group",
    "permute_for_rotary",
    "permute_for_rotary_1d",
]
