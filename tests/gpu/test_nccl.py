"""`nccl` between two GPUs: our trainer, and vLLM's own unmodified one, into the same engine.

The engine is a server on GPU 1, the trainer this process on GPU 0. What each of them pushes must
leave the same tokens and log-probs, bit for bit, as an engine started from that checkpoint, and
checksums of every weight must be the trainer's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from benchmarks import engines
from benchmarks.ipc_gpu import their_source
from tests.gpu.test_engine import _model
from vllm_wt_plugin import TransferError, WeightSync, WeightSyncError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, Path]]:
    out = {}
    for seed in (0, 1):
        model = _model("dense", seed, "cuda:0")
        folder = tmp_path_factory.mktemp(f"seed-{seed}")
        model.save_pretrained(folder)
        out[seed] = model, folder
    return out


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.log"


@pytest.fixture(scope="module")
def url(models: dict[int, tuple[Any, Path]], log: Path) -> Iterator[str]:
    load = ("--load-format", "auto")  # the later one counts
    with engines.server(models[0][1], "nccl", 8140, log, memory=0.2, gpus="1", args=load) as at:
        engines.wait_ready(at, log)
        yield at


@pytest.fixture(scope="module")
def fresh(url: str, models: dict[int, tuple[Any, Path]]) -> dict[int, list[int]]:
    """Tokens of each seed's weights; seed 0's of the engine that was started from them."""
    first = engines.tokens(url)
    with WeightSync(url) as direct:  # over CUDA IPC
        direct.push(models[1][0])
        second = engines.tokens(url)
    assert first != second
    return {0: first, 1: second}


def check(url: str, model: Any, tokens: list[int]) -> None:
    assert engines.tokens(url) == tokens
    with WeightSync(url) as sync:
        assert sync.verify(model).ok


@pytest.mark.parametrize("options", [{}, {"packed": False}, {"buffer_bytes": 8 << 20}])
def test_our_trainer(
    url: str, models: dict[int, tuple[Any, Path]], fresh: dict[int, list[int]],
    options: dict[str, Any],
) -> None:  # fmt: skip
    with WeightSync(url, backend="nccl", verify="full", **options) as sync:
        for seed in (0, 1, 0):
            print(sync.push(models[seed][0]))
            check(url, models[seed][0], fresh[seed])


@contextmanager
def explained(log: Path) -> Iterator[None]:
    """vLLM's client raises the status alone: say what the server answered, and its log's end."""
    try:
        yield
    except requests.HTTPError as exc:
        end = log.read_text(errors="replace")[-6000:]
        pytest.fail(f"{exc}\n{exc.response.text}\n--- the server's log:\n{end}")


@pytest.mark.parametrize("packed", [True, False])
def test_vllms_own_trainer(
    url: str, models: dict[int, tuple[Any, Path]], fresh: dict[int, list[int]], packed: bool,
    log: Path,
) -> None:  # fmt: skip
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLTrainerInitInfo,
        NCCLTrainerWeightTransferEngine,
    )
    from vllm.utils.network_utils import get_open_port

    for seed in (1, 0):
        info = NCCLTrainerInitInfo(
            rank=0, master_address="127.0.0.1", master_port=get_open_port(), world_size=2,
            packed=packed, packed_buffer_size_bytes=8 << 20,
        )  # fmt: skip
        with explained(log):
            engine = NCCLTrainerWeightTransferEngine.trainer_init(
                info, client=HTTPVLLMWeightSyncClient(url), source=their_source(models[seed][0])
            )
            engines.check_pynccl(engine.model_update_group)
            engine.send_weights()
            engine.send_weights()
        check(url, models[seed][0], fresh[seed])
        engine.model_update_group.destroy()


def _status(url: str) -> str:
    with WeightSync(url) as sync:
        return str(sync.status()[0]["state"])


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_trainer_that_is_lost_in_mid_broadcast(
    url: str, models: dict[int, tuple[Any, Path]], fresh: dict[int, list[int]], number: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.test_nccl", url, str(models[1][1])],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "there\n"
        os.kill(process.pid, number)
        assert _until(lambda: _status(url) == "DIRTY", 30)
        with WeightSync(url, backend="nccl") as sync:
            sync.push(models[0][0])
        check(url, models[0][0], fresh[0])
    finally:
        process.kill()


def test_an_abort_ends_a_transfer_that_waits(
    url: str, models: dict[int, tuple[Any, Path]], fresh: dict[int, list[int]]
) -> None:
    """NCCL is told to abort on both sides, and a new group is made after it."""

    class Stuck:
        def __init__(self, rows: list[tuple[str, torch.Tensor]]) -> None:
            self.rows = rows

        def specs(self) -> Any:
            from vllm_wt_plugin import as_source

            return as_source(dict(self.rows)).specs()

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for i, row in enumerate(self.rows):
                if i == 20:
                    time.sleep(6)
                yield row

    stuck = Stuck([(n, t.detach()) for n, t in models[1][0].state_dict().items()])
    with WeightSync(url, backend="nccl", timeout_s=3, buffer_bytes=8 << 20) as sync:
        with pytest.raises(WeightSyncError) as caught:
            sync.push(stuck)
        print(caught.value)
        assert isinstance(caught.value, TransferError)
        assert "bucket" in str(caught.value)
        sync.push(models[0][0])
        check(url, models[0][0], fresh[0])


def main(url: str, folder: str) -> None:
    """The trainer that is lost: half of its tensors are on their way."""
    from safetensors.torch import load_file

    tensors = {n: t.cuda(0) for n, t in load_file(Path(folder, "model.safetensors")).items()}

    class Source:
        def specs(self) -> Any:
            from vllm_wt_plugin import as_source

            return as_source(tensors).specs()

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for i, row in enumerate(tensors.items()):
                if i == len(tensors) // 2:
                    print("there", flush=True)
                    time.sleep(600)
                yield row

    with WeightSync(url, backend="nccl", timeout_s=8, buffer_bytes=8 << 20) as sync:
        sync.push(Source())


if __name__ == "__main__":
    main(*sys.argv[1:])
