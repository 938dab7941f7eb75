"""Training on a GPU server's own weights, with CUDA graphs, against a fresh server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from benchmarks import engines
from benchmarks.gpu_memory import opened
from tests.gpu.test_engine import GRAPHS, _model
from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge

pytestmark = pytest.mark.gpu
ARGS = (
    "--load-format", "auto", "--no-enforce-eager",
    "--compilation-config", json.dumps(GRAPHS["compilation_config"]),
)  # fmt: skip
KV_CACHE = 1 << 30  # as `engines.server` sets it
PROMPTS = [[5, 6, 7, 8], list(range(20, 60))]


@contextmanager
def served(folder: Path, port: int, log: Path) -> Iterator[str]:
    with engines.server(folder, "ipc", port, log, memory=0.05, args=ARGS) as url:
        engines.wait_ready(url, log)
        yield url


def generations(url: str) -> list[Any]:
    out = []
    for prompt in PROMPTS:
        body = {
            "model": "m", "prompt": prompt, "max_tokens": 24, "temperature": 0, "logprobs": 2,
            "ignore_eos": True, "return_token_ids": True, "detokenize": False,
            "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        out.append((choice["token_ids"], choice["logprobs"]["token_logprobs"]))
    return out


@pytest.mark.parametrize(("kind", "port"), [("dense", 8120), ("moe", 8122)], ids=["dense", "moe"])
def test_steps_are_served_as_a_fresh_engine_would(
    kind: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model(kind, 0, "cpu").save_pretrained(tmp_path / "old")
    monkeypatch.setenv("WT_OWN_SEGMENTS", "1")
    with served(tmp_path / "old", port, tmp_path / "live.log") as url:
        before = generations(url)
        config = BridgeConfig(model_name=str(tmp_path / "old"), device="cuda:0", vllm_api_url=url)
        with VLLMWeightBridge(config) as bridge:
            torch.cuda.init()
            allocated = torch.cuda.memory_allocated()
            model = bridge.get_trainable_model()
            assert torch.cuda.memory_allocated() - allocated < 1 << 20  # rotary tables
            where = [p.data_ptr() for p in model.parameters()]
            weights = sum(p.nbytes for p in model.parameters())
            print(f"\n{kind}: {weights >> 20} MiB, opened {opened(model) >> 20} MiB")
            assert weights <= opened(model) < KV_CACHE
            optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-3)
            for step in (1, 2):
                g = torch.Generator().manual_seed(step)
                ids = torch.randint(3, 4000, (2, 64), generator=g).cuda()
                optimizer.zero_grad()
                model(ids, labels=ids).loss.backward()
                with bridge.update(version=step):
                    optimizer.step()
            assert bridge.status()["version"] == "2"
            after = generations(url)
            assert [p.data_ptr() for p in model.parameters()] == where
            model.save_pretrained(tmp_path / "new")
    with served(tmp_path / "new", port + 1, tmp_path / "fresh.log") as url:
        expected = generations(url)
    assert after == expected
    assert before != after
