"""Model shapes the benchmarks use, and folders that `vllm` starts from with dummy weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "dtype": "bfloat16", "hidden_act": "silu", "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "head_dim": 128,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _QWEN3 | {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8,
        "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32768,
    },
    "8b": _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
    },
    # Qwen3-30B-A3B with fewer layers: `layers` sets how many.
    "30b-a3b": _QWEN3 | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001, "output_router_logits": False,
    },
}  # fmt: skip


def nbytes(shape: str, layers: int) -> int:
    """Bytes of the weights in bfloat16."""
    c = SHAPES[shape]
    h, d = c["hidden_size"], c["head_dim"]
    heads = c["num_attention_heads"] + c["num_key_value_heads"]
    experts = c.get("num_experts", 0)
    mlp = 3 * h * c["intermediate_size"]
    if experts:
        mlp = experts * h * (3 * c["moe_intermediate_size"] + 1)
    layer = 2 * h * d * heads + 2 * d + 2 * h + mlp
    return 2 * (layers * layer + 2 * c["vocab_size"] * h + h)


def fitting(shape: str, free: int, copies: float, *, least: int, most: int) -> int:
    """How many layers, at most `most`, so that `copies` of the weights take no more than `free`
    bytes. Raises SystemExit where not even `least` fit."""
    for layers in range(most, least - 1, -1):
        if copies * nbytes(shape, layers) <= free:
            return layers
    need = copies * nbytes(shape, least) / 2**30
    raise SystemExit(f"{copies} x {shape} with {least} layers needs {need:.0f} GiB free")


def folder(shape: str, path: Path, *, layers: int | None = None) -> Path:
    """Write config.json for `--load-format dummy --skip-tokenizer-init`."""
    config = dict(SHAPES[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config, indent=1))
    return path


def trainer_model(path: Path, device: str, seed: int = 0) -> Any:
    """A transformers model of the folder's config with random bf16 weights on `device`."""
    import torch
    import transformers as tf

    config = tf.AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    fill(model, seed)
    return model.requires_grad_(False)


def fill(model: Any, seed: int = 0) -> None:
    """The weights that `trainer_model` gives, again."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.uniform_(0.5, 1.5)
