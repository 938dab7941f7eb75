"""Tiny random checkpoints, one per architecture; weights differ enough for wrong ones to show."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers as tf

VOCAB = 288
_BASE = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}


def config(kind: str, *, tied: bool = False) -> Any:
    """The transformers config of one architecture; sizes that vLLM's CPU kernels accept."""
    b: dict[str, Any] = _BASE | {"tie_word_embeddings": tied}
    wide = b | {"hidden_size": 128}
    match kind:
        case "llama":
            return tf.LlamaConfig(head_dim=32, **b)
        case "llama_bias":
            return tf.LlamaConfig(head_dim=32, attention_bias=True, mlp_bias=True, **b)
        case "qwen3":
            return tf.Qwen3Config(head_dim=32, **b)
        case "qwen2":
            return tf.Qwen2Config(**wide)
        case "qwen3_moe":
            return tf.Qwen3MoeConfig(
                head_dim=32, num_experts=4, norm_topk_prob=True, decoder_sparse_step=1,
                mlp_only_layers=[], **_MOE, **b,
            )  # fmt: skip
        case "gemma3":
            return tf.Gemma3TextConfig(
                head_dim=32, sliding_window=64, query_pre_attn_scalar=32, **b
            )
        case "phi3":
            return tf.Phi3Config(**wide)
        case "gpt2":
            return tf.GPT2Config(
                vocab_size=VOCAB, n_embd=128, n_layer=2, n_head=4, n_positions=512,
                bos_token_id=0, eos_token_id=1,
            )  # fmt: skip
        case "mixtral":
            return tf.MixtralConfig(
                head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, **b
            )
        case "deepseek_v2":
            return tf.DeepseekV2Config(
                **b | {"num_key_value_heads": 4}, **_MOE, n_routed_experts=4, n_shared_experts=1,
                first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_nope_head_dim=32,
                qk_rope_head_dim=64, v_head_dim=32, n_group=1, topk_group=1, topk_method="greedy",
            )  # fmt: skip
        case "deepseek_v3":
            return tf.DeepseekV3Config(
                **b | {"num_key_value_heads": 4}, **_MOE, n_routed_experts=4, n_shared_experts=1,
                first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=64, qk_nope_head_dim=32,
                qk_rope_head_dim=64, v_head_dim=32, n_group=1, topk_group=1,
                topk_method="noaux_tc", scoring_func="sigmoid",
            )  # fmt: skip
        case "mamba2":
            return tf.Mamba2Config(
                vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, head_dim=32, num_heads=4,
                state_size=16, n_groups=1, expand=2, conv_kernel=4, chunk_size=16,
                tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1,
            )  # fmt: skip
        case "gpt_oss":
            return tf.GptOssConfig(
                **b, head_dim=64, num_local_experts=4, num_experts_per_tok=2, sliding_window=128
            )
        case "llama4":
            return tf.Llama4TextConfig(
                head_dim=32, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=128,
                interleave_moe_layer_step=1, **b,
            )  # fmt: skip
        case "qwen3_next":
            return tf.Qwen3NextConfig(
                head_dim=32, num_experts=4, **_MOE, shared_expert_intermediate_size=64,
                linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=128,
                linear_value_head_dim=128, **b,
            )  # fmt: skip
        case "bloom":
            return tf.BloomConfig(
                vocab_size=VOCAB, hidden_size=128, n_layer=2, n_head=4,
                bos_token_id=0, eos_token_id=1,
            )  # fmt: skip
        case "phi":
            return tf.PhiConfig(**wide)
    raise KeyError(kind)


def build(kind: str, seed: int, *, tied: bool = False) -> Any:
    """A random bf16 `PreTrainedModel`; another seed gives other weights everywhere."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config(kind, tied=tied)).to(torch.bfloat16)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(0, 0.08)
            elif "norm" in name or name.endswith(".weight"):
                p.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                p.uniform_(0, 1)
            else:
                p.normal_(0, 0.1)
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.normal_(0, 0.1)
    return model.requires_grad_(False)


def save(model: Any, folder: Path) -> Path:
    """Checkpoint and byte-level tokenizer, as `vllm serve` reads them."""
    model.save_pretrained(folder)
    _tokenizer(folder)
    return folder


def edited(model: Path, folder: Path, prefix: str) -> Path:
    """A copy of a checkpoint in which only the tensors named `prefix…` have other values."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    names = [n for n in tensors if n.startswith(prefix)]
    if not names:
        raise KeyError(prefix)
    torch.manual_seed(0)
    for n in names:
        tensors[n] = tensors[n] * torch.empty_like(tensors[n]).uniform_(0.5, 1.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def widened(model: Any) -> Any:
    """`model` in float32 (in place), with other values that all round to the bf16 ones."""
    with torch.no_grad():
        for p in model.float().parameters():
            near = p * (1 + torch.empty_like(p).uniform_(-(2**-10), 2**-10))
            p.copy_(torch.where(near.bfloat16() == p.bfloat16(), near, p))
    return model


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|bos|>": 0, "<|eos|>": 1, **{c: i + 2 for i, c in enumerate(alphabet)}}
    tok = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens(["<|bos|>", "<|eos|>"])
    tok.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>",
                "eos_token": "<|eos|>", "pad_token": "<|eos|>", "model_max_length": 512,
            }
        )
    )  # fmt: skip
