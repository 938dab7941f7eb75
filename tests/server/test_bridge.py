"""Training on the server's own weights, on the CPU: against a fresh vLLM from what was trained."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import models
from tests.support.offline import ONE_THREAD, Offline, ask_server, differences
from tests.support.server import Server
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge

pytestmark = pytest.mark.server
ENV = {"WT_CPU_INPLACE": "1"} | ONE_THREAD
SEED = 21
KINDS = [
    pytest.param("qwen3_moe"),
    pytest.param("qwen3-tied"),
    pytest.param("qwen3", marks=pytest.mark.full),
    pytest.param("llama", marks=pytest.mark.full),
]


@dataclass
class Live:
    """A server that trains, where its LOGDIR is, and the engines it is compared with."""

    server: Server
    folder: Path
    logs: Path
    reference: Offline
    tmp: Path

    def bridge(self, **options: Any) -> VLLMWeightBridge:
        config = BridgeConfig(
            model_name=str(self.folder), device="cpu", vllm_api_url=self.server.url, **options
        )
        return VLLMWeightBridge(config)

    def fresh(self, model: nn.Module, name: str) -> Any:
        """What a vLLM says that has just loaded what `model.save_pretrained` wrote."""
        return self.reference.fresh(models.save(model, self.tmp / name))


@pytest.fixture(scope="module", params=KINDS)
def live(
    request: pytest.FixtureRequest,
    checkpoint: Callable[..., Path],
    offline: Callable[..., Offline],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Live]:
    kind, _, tied = request.param.partition("-")
    folder = checkpoint(kind, SEED, tied=bool(tied))
    tmp = tmp_path_factory.mktemp("bridge")
    reference = offline("reference", env=ENV)
    logs = tmp / "logs"
    with Server(folder, tmp / "server.log", env=ENV | {"LOGDIR": str(logs)}) as server:
        yield Live(server, folder, logs, reference, tmp)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Gradients of one batch; the caller steps."""
    optimizer.zero_grad()
    ids = torch.randint(3, 280, (4, 24), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()


def places(model: nn.Module) -> list[tuple[int, tuple[int, ...]]]:
    return [(p.data_ptr(), p.stride()) for p in model.parameters()]


def test_steps_are_served_as_a_fresh_engine_would(live: Live) -> None:
    before = ask_server(live.server)
    with live.bridge() as bridge:
        model = bridge.get_trainable_model()
        assert all(p.requires_grad and p.numel() for p in model.parameters())
        assert differences(ask_server(live.server), before) == []  # attaching changes nothing
        where = places(model)
        optimizer = torch.optim.AdamW(bridge.parameters(), lr=3e-3)
        for step in (1, 2, 3):
            train(model, optimizer, step)
            with bridge.update(version=f"step {step}"):
                optimizer.step()
            assert bridge.status()["version"] == f"step {step}"
        after = ask_server(live.server)
        assert [a["logprobs"] for a in after] != [b["logprobs"] for b in before]
        assert differences(after, live.fresh(model, "trained")) == []
        assert places(model) == where
        with WeightSync(live.server.url) as sync:  # the old weights, by a push: the model has them
            sync.push(live.folder)
        assert differences(ask_server(live.server), before) == []
        assert differences(live.fresh(model, "pushed"), before) == []


def test_masters_and_notify(live: Live) -> None:
    """fp32 masters; and a trainer that steps first and tells afterwards."""
    with live.bridge() as bridge:
        model = bridge.get_trainable_model(master="fp32")
        optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-3)
        train(model, optimizer, 4)
        with bridge.update(version=4, mode="overlap"):
            optimizer.step()
        assert differences(ask_server(live.server), live.fresh(model, "overlap")) == []
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)
        bridge.notify_update()
        assert bridge.status()["version"] == "2"
        assert differences(ask_server(live.server), live.fresh(model, "told")) == []


def test_a_reader_of_the_documented_file_finds_every_tensor(live: Live) -> None:
    """As Atropos' trainer reads it: `param_mappings` names a tensor, `ipc_handles` opens it."""
    with live.bridge() as bridge:
        model = bridge.get_trainable_model()
        path = live.logs / "vllm_bridge_config.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        data = json.loads(path.read_text())
        assert data["single_copy_enabled"] is True
        assert data["num_params"] == len(data["ipc_handles"]) == len(data["param_names"])
        own = {n: t for n, t in bridge.shared_state_dict.items()}
        assert data["param_mappings"].keys() == own.keys()
        for name, info in data["param_mappings"].items():
            whole = opened(data["ipc_handles"][info["vllm_name"]])
            part = whole.as_strided(info["shape"], info["stride"], info["storage_offset"])
            assert info["dtype"] == str(own[name].dtype)
            assert torch.equal(part, own[name])
        assert model is bridge.get_trainable_model()


def opened(info: dict[str, Any]) -> torch.Tensor:
    """One tensor, by the fields that the file documents."""
    assert info.keys() == {
        "device_index", "ipc_handle_b64", "storage_size", "storage_offset_orig",
        "ref_counter_handle_b64", "ref_counter_offset", "event_handle_b64",
        "event_sync_required", "dtype", "tensor_storage_offset", "shape", "stride",
    }  # fmt: skip
    name = base64.b64decode(info["ipc_handle_b64"]).decode()
    memory = torch.UntypedStorage.from_file(f"/dev/shm{name}", False, info["storage_size"])
    dtype = getattr(torch, info["dtype"].removeprefix("torch."))
    tensor = torch.empty(0, dtype=dtype)
    return tensor.set_(memory, info["tensor_storage_offset"], info["shape"], info["stride"])


def test_one_copy(live: Live) -> None:
    """Every parameter of the trainer lies in a segment that the engine maps too, and the segments
    hold the model once."""
    with live.bridge() as bridge:
        model = bridge.get_trainable_model()
        mine, theirs = segments(os.getpid()), {}
        for process in Path("/proc").glob("[0-9]*"):
            if process.name != str(os.getpid()) and in_group(process, live.server.process.pid):
                theirs |= segments(int(process.name))
        used = set()
        for p in model.parameters():
            name = next(n for n, (low, high) in mine.items() if low <= p.data_ptr() < high)
            assert name in theirs
            used.add(name)
        size = sum((Path("/dev/shm") / n).stat().st_size for n in used)
        need = sum(p.nbytes for p in model.parameters())
        assert need <= size <= need * 1.1  # vLLM pads the vocabulary


def segments(pid: int) -> dict[str, tuple[int, int]]:
    """Shared-memory segments of ours that a process maps: name → address range."""
    rows = re.findall(
        r"^(\w+)-(\w+) .*/dev/shm/(wt_\w{32})$",
        Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE,
    )  # fmt: skip
    return {name: (int(low, 16), int(high, 16)) for low, high, name in rows}


def in_group(process: Path, group: int) -> bool:
    try:
        return os.getpgid(int(process.name)) == group
    except ProcessLookupError:
        return False


def test_times_of_the_tests_do_not_depend_on_leases(live: Live) -> None:
    """A status after everything: whole, and nobody attached any more."""
    deadline = time.monotonic() + 10
    while (status := live.server.http.get("/bridge/status").json())["attached"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (status["state"], status["reason"]) == ("IDLE", "")
