"""`WT_CPU_INPLACE=1`: keep CPU weights plain, so that they can be updated and trained in place.

vLLM packs CPU weights after loading: linear layers (dropping the original), embeddings and
`lm_head` (keeping it, unread), MoE experts. Here each computes from the checkpoint-form tensor,
with torch's own kernels: slower, other bits than the packed kernels, same mathematics.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from vllm.model_executor.layers import utils as layer_utils
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.platforms import current_platform

from vllm_wt_plugin._vllm import experts_apply, plain_experts, wrap


def enable() -> None:
    """Idempotent; does nothing where vLLM does not run on CPU."""
    if not current_platform.is_cpu():
        return
    wrap(layer_utils, "dispatch_cpu_unquantized_gemm", lambda _: _plain_gemm)
    experts = CPUUnquantizedExperts
    wrap(experts, "process_weights_after_loading", lambda _: plain_experts)
    wrap(experts, "apply", lambda _: experts_apply(experts, _apply_experts))


def _plain_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
    if layer.weight.ndim == 2:
        layer.cpu_linear = F.linear  # type: ignore[assignment]


def _apply_experts(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: MoEActivation,
    expert_map: torch.Tensor | None,
    apply_router_weight_on_input: bool = False,
    **_: Any,
) -> None:
    """Each expert's tokens through its two plain matrices; `expert_map` gives local numbers."""
    out = torch.zeros(output.shape, dtype=torch.float32)
    ids = topk_ids if expert_map is None else expert_map[topk_ids.long()]
    for e in torch.unique(ids).tolist():
        if e < 0:
            continue
        rows, slots = torch.where(ids == e)
        h = F.linear(hidden_states[rows], w1[e], _of(self.w1_bias, e))
        act = _activate(activation, h)
        y = F.linear(act, w2[e], _of(self.w2_bias, e)).float()
        if not apply_router_weight_on_input:
            y *= topk_weights[rows, slots].unsqueeze(1)
        out.index_add_(0, rows, y)
    output.copy_(out)


def _activate(activation: MoEActivation, h: torch.Tensor) -> torch.Tensor:
    if activation == MoEActivation.SWIGLUOAI:  # vLLM's operator for it exists on GPUs only
        gate, up = h[:, ::2].clamp(max=7.0), h[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)
    act = h.new_empty(h.shape[0], h.shape[1] // 2)
    apply_moe_activation(activation, act, h)
    return act


def _of(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert]
