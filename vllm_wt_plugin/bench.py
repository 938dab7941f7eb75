"""What a push costs beside vLLM's own reload and a bare copy: one model size, in this process.

    python -m vllm_wt_plugin.bench PARAMETERS ROUNDS FILE       (`vllm-wt bench` starts it)

Engine and trainer share the process, so that no transport is in the way: vLLM's layerwise reload
is handed the very tensors that are pushed. Every round does everything once, one after another, so
that whatever else the machine does falls on all alike. Weights are random, on one thread of a CPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vllm_wt_plugin.trainer.sync import WeightSync

SHARES = (0.001, 0.01, 0.1)  # of the elements, changed before a sparse push
COPY, DENSE, RELOAD = "memcpy", "push dense", "vLLM's layerwise reload"
VOCAB, HEAD = 4096, 64
ENV = {  # of the process: vLLM reads it when it is imported
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": "wt", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "WT_CPU_INPLACE": "1", "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def sparse(share: float) -> str:
    """The row of a share."""
    return f"push {share:.1%}"


def config(parameters: int) -> dict[str, Any]:
    """A dense Qwen3 of about so many parameters, its depth in step with its width."""
    hidden = max(128, 128 * round((parameters / 0.12) ** (1 / 3) / 128))
    layer = 12 * hidden * hidden  # 3 h x h of attention, 9 of the MLP
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": HEAD,
        "num_hidden_layers": max(1, round((parameters - 2 * VOCAB * hidden) / layer)),
        "num_attention_heads": hidden // HEAD, "num_key_value_heads": hidden // HEAD // 2,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "max_position_embeddings": 512,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "rms_norm_eps": 1e-6,
    }  # fmt: skip


def trainer_model(folder: Path) -> Any:
    """transformers' model of the folder's config, with random bf16 weights."""
    import transformers

    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.from_pretrained(folder)
        )
    model: Any = made.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    torch.manual_seed(0)
    for p in model.parameters():
        p.normal_(0, 0.02) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    return model


def engine(folder: Path) -> Any:
    """An `LLM` whose worker is in this process, with weights of its own."""
    from vllm import LLM

    return LLM(
        model=str(folder), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True,
        max_model_len=256, max_num_seqs=2, max_num_batched_tokens=256, dtype="bfloat16",
        weight_transfer_config={"backend": "ipc"},
    )  # fmt: skip


class Flips:
    """Changes a share of every tensor's elements by their lowest bit, others each time."""

    def __init__(self, model: Any, share: float) -> None:
        self._flat = [p.view(torch.int16).view(-1) for p in model.parameters()]
        self._share, self._random = share, torch.Generator().manual_seed(int(share * 1e6))

    def __call__(self) -> None:
        for flat in self._flat:
            n = max(1, int(flat.numel() * self._share))
            at = torch.randint(flat.numel(), (n,), generator=self._random).unique()
            flat[at] ^= 1


class Rounds:
    """Milliseconds of each row, a value for each round."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    def time(self, row: str, what: Callable[[], object]) -> None:
        start = time.perf_counter()
        what()
        self.rows.setdefault(row, []).append((time.perf_counter() - start) * 1e3)


def measure(parameters: int, rounds: int) -> dict[str, Any]:
    """Everything, after one round that does not count. `same`: whether the engine held the
    trainer's bits in that one, after vLLM's reload and after our last push."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config(parameters)))
        model, llm = trainer_model(folder), engine(folder)
    nbytes = sum(p.nbytes for p in model.parameters())
    steps = {share: Flips(model, share) for share in SHARES}
    with WeightSync(llm) as sync:
        first = time.perf_counter()
        report = sync.push(model)
        first = time.perf_counter() - first
        found = Rounds()
        same = _round(found, llm, sync, model, nbytes, steps, check=True)
        for _ in range(rounds):
            _round(found, llm, sync, model, nbytes, steps)
        plan = report.replicas[0].plan
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "bytes": nbytes,
        "tensors": report.tensors, "first push, ms": first * 1e3,
        "same": same,
        "processed": len(plan.processed) if plan else 0, "threads": torch.get_num_threads(),
        "rows": {name: ms[1:] for name, ms in found.rows.items()},
    }  # fmt: skip


def _round(
    found: Rounds, llm: Any, sync: WeightSync, model: Any, nbytes: int, steps: dict[float, Flips],
    *, check: bool = False,
) -> bool:  # fmt: skip
    """Whether the engine held the trainer's bits, if that is to be checked."""
    pair = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(2)]
    found.time(COPY, lambda: pair[1].copy_(pair[0]))
    pair.clear()
    steps[0.1]()
    theirs = {"weights_iterator": model.state_dict().items()}
    found.time(RELOAD, lambda: llm.collective_rpc("reload_weights", kwargs=theirs))
    same = not check or sync.verify(model).ok
    steps[0.1]()
    found.time(DENSE, lambda: sync.push(model))
    sync.push(model, mode="sparse")  # dense: it takes the copy to compare with
    for share, step in steps.items():
        step()
        found.time(sparse(share), lambda: sync.push(model, mode="sparse"))
    return same and (not check or sync.verify(model).ok)


def main(parameters: str, rounds: str, file: str) -> None:
    os.environ.update(ENV)
    torch.set_num_threads(1)
    Path(file).write_text(json.dumps(measure(int(parameters), int(rounds))))


if __name__ == "__main__":
    main(*sys.argv[1:])
