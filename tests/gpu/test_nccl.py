"""`nccl` between two GPUs: our trainer, and vLLM's own unmodified one, into the same engine.

The engine is a server on GPU 1, the trainer this process on GPU 0. What each of them pushes must
leave the same tokens and log-probs, bit for bit, as an engine started from that checkpoint, and
checksums of every weight must be the trainer's.
"""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from benchmarks import engines
from benchmarks.ipc_gpu import their_source
from tests.gpu.test_engine import _model
from vllm_wt_plugin import (
    NCCLWeightTransferEngine,
    SparseWeightPatch,
    TransferError,
    WeightSync,
    WeightSyncError,
)

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
    backend = "sparse_nccl"  # the name that vLLM's sparse trainer asks for; it takes all of them
    with engines.server(models[0][1], backend, 8140, log, memory=0.2, gpus="1", args=load) as at:
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


def test_our_trainer_sends_what_changed(
    url: str, models: dict[int, tuple[Any, Path]], fresh: dict[int, list[int]]
) -> None:
    model = copy.deepcopy(models[0][0])
    with WeightSync(url, backend="nccl") as sync, torch.no_grad():
        sync.push(model, mode="sparse")
        check(url, model, fresh[0])
        for step in range(3):
            for p in model.parameters():
                p.view(-1)[step::97] *= 1.5
            report = sync.push(model, mode="sparse")
            assert report.changed is not None
            assert 0 < report.changed < 0.02
            assert sync.verify(model).ok
        for p, new in zip(model.parameters(), models[1][0].parameters(), strict=True):
            p.copy_(new)
        report = sync.push(model, mode="sparse")
        assert report.changed is not None
        assert report.changed > 0.9
        check(url, model, fresh[1])


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


def patches(kind: Any, models: dict[int, tuple[Any, Path]]) -> list[Any]:
    """All that makes seed 1 of seed 0."""
    old, new = (models[seed][0].state_dict() for seed in (0, 1))
    rows = ((n, t.reshape(-1), new[n].reshape(-1)) for n, t in old.items())
    changed = ((n, (a != b).nonzero().reshape(-1).int(), b) for n, a, b in rows)
    return [kind(n, i, b[i], tuple(new[n].shape)) for n, i, b in changed]


def test_vllms_own_sparse_trainer(
    url: str, models: dict[int, tuple[Any, Path]], fresh: dict[int, list[int]], log: Path
) -> None:
    from vllm.distributed.weight_transfer import sparse_nccl_engine as theirs
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
    from vllm.utils.network_utils import get_open_port

    with WeightSync(url) as sync:
        sync.push(models[0][0])
    info = theirs.SparseNCCLTrainerInitInfo(
        rank=0, master_address="127.0.0.1", master_port=get_open_port(), world_size=2
    )
    with explained(log):
        engine = theirs.SparseNCCLTrainerWeightTransferEngine.trainer_init(
            info, client=HTTPVLLMWeightSyncClient(url)
        )
        engines.check_pynccl(engine.model_update_group)
        engine.send_weights(patches(theirs.SparseWeightPatch, models))
    check(url, models[1][0], fresh[1])
    engine.shutdown()


def test_the_engine_api(
    url: str, models: dict[int, tuple[Any, Path]], fresh: dict[int, list[int]]
) -> None:
    """`NCCLWeightTransferEngine` of this package: the trainer's end, dense, packed and sparse."""
    from vllm.utils.network_utils import get_open_port

    where = {"master_address": "127.0.0.1", "master_port": get_open_port(), "world_size": 2}

    def post(path: str, body: Any = None) -> None:
        answer = requests.post(f"{url}/{path}", json=body, timeout=120)
        assert answer.status_code == 200, answer.text

    def update(info: dict[str, Any], send: Callable[[], None]) -> None:
        post("start_weight_update")
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(post, "update_weights", {"update_info": info})
            send()
            asked.result()
        post("finish_weight_update")

    engine = NCCLWeightTransferEngine
    with ThreadPoolExecutor(1) as beside:
        body = {"init_info": where | {"rank_offset": 1}}
        asked = beside.submit(post, "init_weight_transfer_engine", body)
        group = engine.trainer_init(where)
        asked.result()
    for seed, packed in ((1, {}), (0, {"packed": True, "packed_buffer_size_bytes": 8 << 20})):
        tensors = models[seed][0].state_dict()
        info = {
            "names": list(tensors), "shapes": [list(t.shape) for t in tensors.values()],
            "dtype_names": [str(t.dtype).split(".")[-1] for t in tensors.values()],
        }  # fmt: skip
        rows = tensors.items()
        update(info | packed, lambda: engine.trainer_send_weights(rows, group=group, **packed))  # noqa: B023
        check(url, models[seed][0], fresh[seed])
    given = patches(SparseWeightPatch, models)
    info |= {
        "names": [p.name for p in given], "update_kind": "sparse_flat",
        "num_updates_list": [p.values.numel() for p in given],
    }  # fmt: skip
    update(info, lambda: engine.trainer_send_sparse_weights(given, {"group": group}))
    check(url, models[1][0], fresh[1])
    group.destroy()


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
