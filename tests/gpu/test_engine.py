"""Pushes into a vLLM engine on a GPU, bit for bit against that engine fresh from the checkpoint.

One start per case: the fresh engine answers first; then all of its weights are overwritten, and a
push must bring them back.
"""

from __future__ import annotations

import gc
import os
import statistics as st
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ["VLLM_PLUGINS"] = "wt"

# Graphs without torch.compile, which would take most of the time.
GRAPHS: dict[str, Any] = {
    "compilation_config": {
        "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2],
    },
}  # fmt: skip
EAGER = {"enforce_eager": True}
FP8 = {"quantization": "fp8", **EAGER}
PROMPTS = [{"prompt_token_ids": ids} for ids in ([5, 6, 7, 8], list(range(20, 60)))]


def _config(kind: str) -> Any:
    import transformers as tf

    base = {
        "vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 8,
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
        model=str(folder), skip_tokenizer_init=True, max_model_len=512, max_num_seqs=16,
        max_num_batched_tokens=1024, dtype="bfloat16", gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 28, weight_transfer_config={"backend": "ipc"}, **options,
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


def _scramble(model: torch.nn.Module) -> None:
    """Other bits in every live parameter, small enough to stay finite."""
    with torch.no_grad():
        for p in model.parameters():
            raw = p.untyped_storage()
            bits = torch.empty(0, dtype=torch.uint8, device=p.device).set_(raw)
            bits.copy_(torch.randint(0, 32, bits.shape, dtype=torch.uint8, device=p.device))


def _ms(f: Callable[[], object], rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        f()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return st.median(times)


def _drop(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("dense", EAGER), ("dense", GRAPHS), ("dense", FP8), ("moe", GRAPHS), ("moe", FP8)],
    ids=["dense-eager", "dense-graphs", "dense-fp8", "moe-graphs", "moe-fp8"],
)
def test_push_equals_a_fresh_engine(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    from vllm_wt_plugin import WeightSync, as_source

    old, new = _model(kind, 0), _model(kind, 1)
    new.save_pretrained(tmp_path / "new")
    llm = _llm(tmp_path / "new", **options)
    expected = _generate(llm)
    expected_sums = llm.collective_rpc("compute_weight_checksums")
    with WeightSync(llm) as sync:
        plan = sync.push(old).replicas[0].plan
        assert _generate(llm) != expected
        assert bool(plan.processed) == ("quantization" in options)
        assert not plan.opaque
        llm.apply_model(_scramble)
        llm.reset_prefix_cache()
        assert _generate(llm) != expected
        sync.push(new)
        assert _generate(llm) == expected
        assert llm.collective_rpc("compute_weight_checksums") == expected_sums
        for turn in range(2):  # what was described for the push before is used again
            with torch.no_grad():
                for p in new.parameters():
                    p.neg_()
            sync.push(new)
            same = llm.collective_rpc("compute_weight_checksums") == expected_sums
            assert same is bool(turn)
        assert _generate(llm) == expected
        took = _ms(lambda: sync.push(new))
    llm.apply_model(_scramble)
    theirs = {"weights_iterator": list(as_source(new))}
    again = _ms(lambda: llm.collective_rpc("reload_weights", kwargs=theirs))
    llm.reset_prefix_cache()
    print(f"\n{kind} {options}: push {took:.1f} ms, vLLM's own reload {again:.1f} ms")
    assert _generate(llm) == expected
    _drop(llm)
