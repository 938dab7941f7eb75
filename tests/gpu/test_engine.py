"""Pushes into a vLLM engine on a GPU, bit for bit against a fresh engine from the checkpoint."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ["VLLM_PLUGINS"] = "wt"

PROMPTS = [{"prompt_token_ids": ids} for ids in ([5, 6, 7, 8], list(range(20, 60)))]


def _config(kind: str) -> Any:
    import transformers as tf

    base = {
        "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "moe":
        return tf.Qwen3MoeConfig(
            num_experts=32, num_experts_per_tok=4, moe_intermediate_size=512,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], **base,
        )  # fmt: skip
    return tf.Qwen3Config(**base)


def _model(kind: str, seed: int, device: str = "cuda") -> Any:
    import transformers as tf

    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(_config(kind)).to(torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return model.to(device)


def _llm(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        model=str(folder), skip_tokenizer_init=True, max_model_len=512, dtype="bfloat16",
        gpu_memory_utilization=0.15, weight_transfer_config={"backend": "ipc"}, **options,
    )  # fmt: skip


def _generate(llm: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=24, logprobs=2, ignore_eos=True, detokenize=False
    )
    return [
        [(t, d[t].logprob) for t, d in zip(c.token_ids, c.logprobs, strict=True)]
        for c in (o.outputs[0] for o in llm.generate(PROMPTS, params, use_tqdm=False))
    ]


def _drop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dense", {"enforce_eager": True}),
        ("dense", {"enforce_eager": False}),
        ("moe", {"enforce_eager": False}),
        ("dense", {"enforce_eager": True, "quantization": "fp8"}),
        ("moe", {"enforce_eager": True, "quantization": "fp8"}),
    ],
    ids=["dense-eager", "dense-graphs", "moe-graphs", "dense-fp8", "moe-fp8"],
)
def test_push_equals_a_fresh_engine(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    from vllm_wt_plugin import WeightSync

    old, new = _model(kind, 0), _model(kind, 1)
    for name, model in (("old", old), ("new", new)):
        model.save_pretrained(tmp_path / name)
    llm = _llm(tmp_path / "old", **options)
    before = _generate(llm)
    with WeightSync(llm) as sync:
        report = sync.push(new)
        plan = report.replicas[0].plan
        after = _generate(llm)
        sums = llm.collective_rpc("compute_weight_checksums")
        sync.push(old)
        back = _generate(llm)
    _drop(llm)
    fresh = _llm(tmp_path / "new", **options)
    expected = _generate(fresh)
    expected_sums = fresh.collective_rpc("compute_weight_checksums")
    _drop(fresh)
    assert after == expected != before
    assert back == before
    assert sums == expected_sums
    print(f"\n{kind} {options}: {report}")
    if "quantization" in options:
        assert plan.processed
    else:
        assert not plan.processed
        assert not plan.opaque
