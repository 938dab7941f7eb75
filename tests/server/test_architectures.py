"""Every architecture ends bit-exact after a push: by the plan, or by vLLM's own loader.

The target is an `LLM` object: in this process' memory, or with its workers in other processes.
What it says after each push is compared with a fresh engine in another process (and mode).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.offline import Offline, differences

pytestmark = pytest.mark.server
A, B = 21, 22
MODES = ("packed", "inplace")  # CPU weights: vLLM's packed kernels, or WT_CPU_INPLACE=1


@dataclass(frozen=True)
class Arch:
    """What the plan should say of one architecture; patterns of module names.

    `opaque`: reloaded by vLLM's own loader, all of these and no others. `derived`: tensors that
    only processing makes. `modes`: run by default, the others with `-m full`.
    """

    kind: str
    opaque: str = ""
    derived: str = ""
    ignored: str = ""
    head: str = "lm_head"
    modes: tuple[str, ...] = ("packed",)
    tied: bool = False

    @property
    def name(self) -> str:
        return self.kind + ("-tied" if self.tied else "")


ARCHITECTURES = [
    Arch("llama", modes=()),
    Arch("llama_bias", modes=("inplace",)),
    Arch("qwen3", modes=()),  # in test_exact.py
    Arch("qwen3", tied=True, modes=()),
    Arch("qwen3_moe", modes=("inplace",)),
    Arch("qwen2"),  # biases of q, k and v
    Arch("gemma3"),  # norms that add one
    Arch("phi3"),  # fused in the checkpoint
    Arch("gpt2"),  # transposed, with biases
    Arch("mixtral"),
    Arch("deepseek_v2", derived=r"mla_attn\.W_(UV|UK_T)", modes=("inplace",)),
    Arch("deepseek_v3", derived=r"mla_attn\.W_(UV|UK_T)", modes=()),  # corrected expert scores
    Arch("mamba2", opaque=r"backbone\.layers\.[01]\.mixer(\.conv1d)?"),  # A = -exp(A_log)
    Arch("gpt_oss", opaque=r"model\.layers\.[01]\.mlp\.experts\.routed_experts"),
    Arch("llama4", opaque=r"model\.layers\.[01]\.self_attn\.qkv_proj"),  # permuted by its loader
    Arch("bloom", opaque=r"transformer\.h\.[01]\.self_attention\.query_key_value", modes=()),
    Arch("qwen3_next", modes=()),  # gated delta net
    Arch("phi", opaque="lm_head"),  # by transformers' code; its loader makes the head's bias
]
CASES = [
    pytest.param(
        arch, mode, id=f"{arch.name}-{mode}", marks=() if mode in arch.modes else pytest.mark.full
    )
    for arch in ARCHITECTURES
    for mode in MODES
]


@pytest.mark.parametrize(("arch", "mode"), CASES)
def test_like_a_fresh_engine(
    arch: Arch, mode: str, offline: Callable[..., Offline], checkpoint: Callable[..., Path]
) -> None:
    """Started from A; a model object B, and back to A from its folder."""
    env = {"WT_CPU_INPLACE": "1"} if mode == "inplace" else {}
    a, b = (checkpoint(arch.kind, seed, tied=arch.tied) for seed in (A, B))
    live, reference = offline("live", env=env), offline("reference", env=env)
    with ThreadPoolExecutor(1) as beside:  # two processes, two cores
        pushed = beside.submit(live.push, a, [("module", b), ("folder", a)])
        fresh = [reference.fresh(path) for path in (a, b, a)]
        rows = pushed.result()
    assert fresh[0] != fresh[1]
    steps = ("at the start", "after B", "back at A")
    wrong = {
        step: differences(row["answers"], want)
        for step, row, want in zip(steps, rows, fresh, strict=True)
    }
    assert not any(wrong.values()), wrong
    _check_plan(rows[1]["report"], arch, mode)


def _check_plan(plan: dict[str, Any], arch: Arch, mode: str) -> None:
    strange = [m for m in plan["opaque"] if not re.fullmatch(arch.opaque, m)]
    assert strange == []
    assert bool(plan["opaque"]) == bool(arch.opaque)
    assert (plan["nowhere"], plan["ignored"]) == ([], {})
    assert plan["in_place"] > 0
    if mode == "inplace":
        assert plan["processed"] == {}
    elif "lm_head" not in plan["opaque"]:
        assert any(re.search(r"lm_head|embed|wte", m) for m in plan["processed"]), (
            "the head is packed"
        )
    if arch.derived:
        assert any(re.search(arch.derived, name) for name in plan["derived"])


@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "kind",
    [
        "llama_bias",
        *(
            pytest.param(k, marks=pytest.mark.full)
            for k in ("qwen3_moe", "deepseek_v2", "mamba2", "gpt_oss")
        ),
    ],
)
def test_workers_in_other_processes(
    kind: str, tp: int, offline: Callable[..., Offline], checkpoint: Callable[..., Path]
) -> None:
    """vLLM's default: the LLM object reaches its workers by collective_rpc, the weights by ipc."""
    a, b = (checkpoint(kind, seed) for seed in (A, B))
    live = offline("live", tp=tp, in_process=False)
    reference = offline("reference") if tp == 1 else live
    rows = live.push(a, [("module", b), ("folder", a)])
    for row, path in zip(rows, (a, b, a), strict=True):
        assert differences(row["answers"], reference.fresh(path)) == []
