"""After a push the live server is, bit for bit, a vLLM freshly started from what was pushed.

Compared are greedy tokens, their log-probs, the runners-up and the log-probs of the prompts
(`tests/support/offline.py`), asked in the same order. A push must have dropped the prefix cache:
the last probe would be answered from it. The fresh engine is another process in the same mode.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import models
from tests.support.offline import Answers, Offline, ask_server, differences
from tests.support.server import Server
from vllm_wt_plugin import PushReport, WeightSync

pytestmark = pytest.mark.server
A, B, C = 11, 12, 13  # seeds; every server starts from A

# What runs by default; together they meet every value of every column.
DEFAULT = {
    ("qwen3_moe", "packed", 1),
    ("llama", "inplace", 1),
    ("qwen3-tied", "packed", 2),
}
MATRIX = list(
    itertools.product(
        ("llama", "qwen3", "qwen3-tied", "qwen3_moe"),
        ("packed", "inplace"),  # CPU weights: vLLM's packed kernels, or WT_CPU_INPLACE=1
        (1, 2),  # tensor parallel size
    )
)
CONFIGURATIONS = [
    pytest.param(
        row, id=f"{row[0]}-{row[1]}-tp{row[2]}", marks=() if row in DEFAULT else pytest.mark.full
    )
    for row in MATRIX
]
PARTS = ("head", "norm", "mlp")


@dataclass
class Live:
    """One server, and the fresh engines of the same configuration."""

    kind: str
    tied: bool
    tp: int
    server: Server
    reference: Offline
    checkpoint: Callable[..., Path]

    def folder(self, seed: int) -> Path:
        return self.checkpoint(self.kind, seed, tied=self.tied)

    def model(self, seed: int) -> Any:
        return models.build(self.kind, seed, tied=self.tied)

    def ask(self) -> Answers:
        return ask_server(self.server)

    def fresh(self, seed: int) -> Answers:
        return self.reference.fresh(self.folder(seed))

    def prefix(self, part: str) -> str:
        """Names of one head, one norm, one expert (or MLP matrix) begin with this."""
        if part == "head":
            return "model.embed_tokens.weight" if self.tied else "lm_head.weight"
        if part == "norm":
            return "model.layers.0.post_attention_layernorm.weight"
        moe = "experts.2." if self.kind == "qwen3_moe" else "down_proj."
        return f"model.layers.1.mlp.{moe}"


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def live(
    request: pytest.FixtureRequest,
    checkpoint: Callable[..., Path],
    offline: Callable[..., Offline],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    """A server of one configuration, ended before the next one starts."""
    name, mode, tp = request.param
    kind, _, tied = name.partition("-")
    env = {"WT_CPU_INPLACE": "1"} if mode == "inplace" else {}
    folder = checkpoint(kind, A, tied=bool(tied))
    reference = offline("reference", env=env, tp=tp, in_process=tp == 1)
    log = tmp_path_factory.mktemp("exact") / "server.log"
    server = Server(folder, log, env=env, tp=tp)
    with ThreadPoolExecutor(1) as beside:  # two processes, two cores
        fresh = beside.submit(reference.fresh, folder)
        server.start()
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        out = Live(kind, bool(tied), tp, server, reference, checkpoint)
        # Before any push they agree, so what the tests see is the pushes' doing.
        assert differences(out.ask(), fresh.result()) == []
        yield out


def test_seeds_differ(live: Live) -> None:
    """Else every comparison here would hold for a push that does nothing."""
    assert live.fresh(A) != live.fresh(B) != live.fresh(C) != live.fresh(A)


def test_one_module_trained_on(live: Live) -> None:
    """The trainer's way: one module whose parameters change in place, pushed again and again."""
    module = live.model(A)
    with WeightSync(live.server.url) as sync:
        for seed in (B, C, A):
            with torch.no_grad():
                for mine, new in zip(
                    module.parameters(), live.model(seed).parameters(), strict=True
                ):
                    mine.copy_(new)
            _everywhere(sync.push(module))
            assert differences(live.ask(), live.fresh(seed)) == [], f"seed {seed}"


def test_changes_alone(live: Live) -> None:
    """Sparse pushes: many changes, then few, over all ranks; what takes no patches goes whole."""
    module = live.model(A)
    with WeightSync(live.server.url) as sync:
        sync.push(module, mode="auto")
        for seed, share in ((B, 1.0), (B, 0.01), (A, 1.0)):
            g = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for mine, new in zip(
                    module.parameters(), live.model(seed).parameters(), strict=True
                ):
                    there = torch.rand(mine.shape, generator=g) < share
                    mine.copy_(torch.where(there, new if share == 1.0 else -mine, mine))
            report = sync.push(module, mode="sparse")
            assert report.changed is not None
            assert sync.verify().ok
            if share == 1.0:
                assert differences(live.ask(), live.fresh(seed)) == [], f"seed {seed}"
            else:
                assert report.changed < 0.02
                assert live.ask() != live.fresh(seed)


def test_checkpoint_folders(live: Live) -> None:
    with WeightSync(live.server.url) as sync:
        for seed in (C, B, A):
            _everywhere(sync.push(live.folder(seed)))
            assert differences(live.ask(), live.fresh(seed)) == [], f"seed {seed}"


@pytest.mark.parametrize("part", PARTS)
def test_one_part(live: Live, part: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A checkpoint that differs in one part only: the change shows, and is the right one.

    Plain weights beside packed ones that are read (`lm_head` on CPU) would hide it.
    """
    changed = models.edited(live.folder(A), tmp_path_factory.mktemp(part), live.prefix(part))
    with WeightSync(live.server.url) as sync:
        sync.push(live.folder(A))
        before = live.ask()
        assert differences(before, live.fresh(A)) == []
        sync.push(changed)
        after = live.ask()
    assert [a["logprobs"] for a in after] != [b["logprobs"] for b in before]
    if live.tp == 1 or part == "head":  # one more fresh engine takes 2 s, with two ranks 20 s
        assert differences(after, live.reference.fresh(changed)) == []


def test_float32_module(live: Live) -> None:
    """A float32 trainer pushes what its bf16 cast, rounded to the nearest, would."""
    module = models.widened(live.model(B))
    assert module.dtype == torch.float32
    with WeightSync(live.server.url) as sync:
        sync.push(live.folder(A))
        live.ask()
        sync.push(module)
        assert differences(live.ask(), live.fresh(B)) == []


def test_broadcasts(live: Live) -> None:
    """Over gloo, through small buffers, to every rank."""
    with WeightSync(live.server.url, backend="nccl", buffer_bytes=64 << 10) as sync:
        for seed in (B, A):
            _everywhere(sync.push(live.folder(seed)))
            assert differences(live.ask(), live.fresh(seed)) == [], f"seed {seed}"


def _everywhere(report: PushReport) -> None:
    """All of the model went by the plan, and all of what was pushed was used."""
    plan = report.replicas[0].plan
    assert plan is not None
    assert (plan.opaque, plan.nowhere) == ({}, [])
