"""vLLM's own IPC trainer class and HTTP client, unmodified, against a server with this plugin.

The server's tokens and memory after each way are compared: with our own push of the same weights,
and with what it held before. Needs one GPU and about two minutes.
"""

from __future__ import annotations

import gc
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.test_engine import _model
from tests.support import fleet
from tests.support.server import Server
from vllm_wt_plugin import IPCWeightTransferEngine, WeightSync

pytestmark = pytest.mark.gpu
TOKEN = secrets.token_hex(16)
PROMPT = list(range(20, 60))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("dropin")
    _model("dense", 0, "cpu").save_pretrained(folder / "old")
    args = ("--skip-tokenizer-init", "--enable-scale-out", "--gpu-memory-utilization", "0.15")
    env = {"WT_TOKEN": TOKEN, "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    log = folder / "server.log"
    # Anew: in a fork of what has imported Triton, its kernels take no pointers.
    with Server(folder / "old", log, args=args, env=env, anew=True) as started:
        started.http.headers["Authorization"] = f"Bearer {TOKEN}"
        yield started


@pytest.fixture(autouse=True)
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.netrc(tmp_path, TOKEN, monkeypatch)


def said(server: Server) -> Any:
    body = {"token_ids": PROMPT, "sampling_params": {
        "max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 2}}  # fmt: skip
    answer = server.http.post("/inference/v1/generate", json=body)
    answer.raise_for_status()
    data = answer.json()
    return [{k: v for k, v in c.items() if k in ("token_ids", "logprobs")} for c in data["choices"]]


def by_vllm(server: Server, model: Any, *, packed: bool, buffer: int) -> None:
    from vllm.distributed.weight_transfer.base import ModuleSource
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    info = IPCTrainerInitInfo(rank=0, packed=packed, packed_buffer_size_bytes=buffer)
    client = HTTPVLLMWeightSyncClient(server.url)
    engine = WeightTransferTrainerFactory.trainer_init(
        info, client=client, source=ModuleSource(model)
    )
    engine.send_weights()


@pytest.mark.parametrize(
    ("packed", "buffer"), [(False, 1 << 30), (True, 1 << 30), (True, 12 << 20)],
    ids=["handles", "one-buffer", "chunks"],
)  # fmt: skip
def test_vllms_ipc_trainer(server: Server, packed: bool, buffer: int) -> None:
    old, new = _model("dense", 0), _model("dense", 1)
    with WeightSync(server.url, token=TOKEN) as sync:
        sync.push(new)
        want = said(server)
        sync.push(old)
        before = said(server)
        assert want != before
    by_vllm(server, new, packed=packed, buffer=buffer)
    assert said(server) == want
    assert server.status()["state"] == "IDLE"
    held = _settled()
    for _ in range(5):  # what each round exported, the server has released
        by_vllm(server, new, packed=packed, buffer=buffer)
    assert _settled() <= held + (1 << 20)
    assert said(server) == want
    by_vllm(server, old, packed=packed, buffer=buffer)
    assert said(server) == before


def _settled() -> int:
    gc.collect()
    torch.cuda.ipc_collect()
    return torch.cuda.memory_allocated()


def test_the_engine_api(server: Server) -> None:
    new = _model("dense", 2)
    with WeightSync(server.url, token=TOKEN) as sync:
        sync.push(new)
    want = said(server)
    with WeightSync(server.url, token=TOKEN) as sync:
        sync.push(_model("dense", 0))
    assert said(server) != want
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WT_TOKEN", TOKEN)
        for packed in (False, True):
            server.http.post("/start_weight_update").raise_for_status()
            IPCWeightTransferEngine.trainer_send_weights(
                new.named_parameters(), {"mode": "http", "url": server.url, "packed": packed,
                                         "packed_buffer_size_bytes": 12 << 20})  # fmt: skip
            server.http.post("/finish_weight_update").raise_for_status()
            assert said(server) == want


def test_a_trainer_that_dies_between_two_calls(server: Server) -> None:
    """Its exports are gone with it; the server goes on."""
    before = said(server)
    code = (
        "import signal, sys; from tests.gpu.test_dropin import _model, by_start;"
        "by_start(sys.argv[1]); print('started', flush=True); signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, server.url], stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline().strip() == "started"
        victim.send_signal(signal.SIGKILL)
    server.http.post("/abort_weight_update", json={}).raise_for_status()
    assert said(server) == before


def by_start(url: str) -> None:
    """In another process: an update that its trainer begins and never ends."""
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    HTTPVLLMWeightSyncClient(url).start_weight_update()
