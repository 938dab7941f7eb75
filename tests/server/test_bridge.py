"""Training on the server's own weights, on the CPU: against a fresh vLLM from what was trained."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from tests.support import fleet, models
from tests.support.offline import Offline, ask_server, differences
from tests.support.server import Server
from tests.support.trainer import ROOT, trainer
from vllm_wt_plugin import (
    EngineDirty,
    NoUpdate,
    PlanError,
    RequestError,
    ServerUnreachable,
    StateError,
    UpdateInProgress,
    WeightSync,
)
from vllm_wt_plugin.bridge import BridgeConfig, VLLMWeightBridge

pytestmark = pytest.mark.server
ENV = {"WT_CPU_INPLACE": "1"}
SEED = 21
KINDS = [
    pytest.param("qwen3_moe"),
    pytest.param("qwen3-tied", marks=pytest.mark.full),
    pytest.param("qwen3", marks=pytest.mark.full),
    pytest.param("llama", marks=pytest.mark.full),
]


@dataclass
class Live:
    """A server that trains, where its LOGDIR is, and the engines it is compared with."""

    server: Server
    folder: Path
    logs: Path
    reference: Offline | None
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


def test_a_trainer_that_has_only_the_file(live: Live) -> None:
    """It asks for the file with an empty request, writes on its own, and tells."""
    before = ask_server(live.server)
    response = live.server.http.post("/bridge/export_cuda_ipc", json={})
    assert response.status_code == 200, response.text
    data = json.loads((live.logs / "vllm_bridge_config.json").read_text())
    info = next(i for n, i in data["ipc_handles"].items() if n.endswith("norm.weight"))
    memory = opened(info, write=True)
    with torch.no_grad():
        memory.mul_(1.5)
    body = {"update_count": 7, "trainer_rank": 0, "timestamp": time.time()}
    assert live.server.http.post("/bridge/notify_update", json=body).status_code == 200
    assert live.server.http.get("/bridge/status").json()["version"] == "7"
    assert [a["logprobs"] for a in ask_server(live.server)] != [a["logprobs"] for a in before]
    assert live.server.http.post("/bridge/detach", json={}).json()["attached"] == []
    assert live.server.http.post("/bridge/notify_update", json=body).status_code == 409
    with WeightSync(live.server.url) as sync:
        sync.push(live.folder)


def opened(info: dict[str, Any], *, write: bool = False) -> torch.Tensor:
    """One tensor, by the fields that the file documents."""
    assert info.keys() == {
        "device_index", "ipc_handle_b64", "storage_size", "storage_offset_orig",
        "ref_counter_handle_b64", "ref_counter_offset", "event_handle_b64",
        "event_sync_required", "dtype", "tensor_storage_offset", "shape", "stride",
    }  # fmt: skip
    name = base64.b64decode(info["ipc_handle_b64"]).decode()
    memory = torch.UntypedStorage.from_file(f"/dev/shm{name}", write, info["storage_size"])
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


# ---- faults, on a model large enough to weigh ----------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """100 MB of Llama in vLLM's dev mode (for /sleep), with nothing to be compared with."""
    import transformers as tf

    tmp = tmp_path_factory.mktemp("large")
    config = models.config("llama")
    config.update({"hidden_size": 256, "intermediate_size": 8192, "num_hidden_layers": 8})
    model = tf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    folder = models.save(model, tmp / "model")
    env = ENV | {"VLLM_SERVER_DEV_MODE": "1"}
    with Server(folder, tmp / "server.log", env=env) as server:
        yield Live(server, folder, tmp, None, tmp)


def test_one_copy_in_bytes(large: Live) -> None:
    """Neither the engine nor the trainer grows by a model when they share one."""
    engine = max(engines(large.server), key=lambda pid: memory(pid, "RssAnon"))
    need = sum(f.stat().st_size for f in large.folder.glob("*.safetensors"))
    assert need > 90e6
    before = {pid: memory(pid, "RssAnon") for pid in (engine, os.getpid())}
    with large.bridge() as bridge:
        model = bridge.get_trainable_model()
        after = {pid: memory(pid, "RssAnon") for pid in (engine, os.getpid())}
        assert sum(p.nbytes for p in model.parameters()) > 0.99 * need
        assert after[engine] - before[engine] < -0.7 * need  # its weights moved out
        assert after[os.getpid()] - before[os.getpid()] < 0.3 * need
        shared = sum((Path("/dev/shm") / n).stat().st_size for n in segments(engine))
        assert 0.99 * need < shared < 1.02 * need


def engines(server: Server) -> list[int]:
    return [int(p.name) for p in Path("/proc").glob("[0-9]*") if in_group(p, server.process.pid)]


def memory(pid: int, field: str) -> int:
    """Bytes of one line of /proc/PID/status."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(r.split()[1] for r in status.splitlines() if r.startswith(field))) * 1024


def test_requests_go_on_through_updates(large: Live) -> None:
    """Kept while weights are written, finished after; with and without the pause."""
    with large.bridge() as bridge, ThreadPoolExecutor(3) as pool:
        norm = bridge.get_trainable_model().get_parameter("model.norm.weight")
        enough = threading.Event()

        def ask(number: int) -> list[httpx.Response]:
            answers = []
            while not enough.is_set():
                prompt, options = [5, number], {"max_tokens": 150, "ignore_eos": True}
                answers.append(large.server.complete(prompt, **options))
            return answers

        running = [pool.submit(ask, i) for i in range(3)]
        try:
            for n in range(12):
                mode = "overlap" if n % 3 == 2 else "pause"
                with bridge.update(version=n, mode=mode), torch.no_grad():
                    norm.mul_(1.001)
        finally:
            enough.set()
        for answer in (a for r in running for a in r.result()):
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["completion_tokens"] == 150
        assert bridge.status()["version"] == "11"


def test_a_step_that_fails_leaves_the_engine_dirty_and_the_next_heals_it(large: Live) -> None:
    with large.bridge() as bridge:
        bridge.get_trainable_model()
        with pytest.raises(ZeroDivisionError), bridge.update():
            1 / 0  # noqa: B018
        status = bridge.status()
        assert status["state"] == "DIRTY"
        assert "ZeroDivisionError" in status["reason"]
        assert large.server.complete([5, 6]).status_code == 503
        with bridge.update(version="healed"):
            pass
        assert (bridge.status()["state"], bridge.status()["version"]) == ("IDLE", "healed")
        assert large.server.complete([5, 6]).status_code == 200


def test_a_trainer_that_dies(large: Live) -> None:
    """Attached and idle: nothing happens. Inside an update: DIRTY when its lease ends, healed by
    the next trainer's update."""
    process = dying_trainer(large, "attached")
    assert large.server.http.get("/bridge/status").json()["attached"] != []
    kill(process)
    status = large.server.http.get("/bridge/status").json()
    assert (status["attached"], status["state"]) == ([], "IDLE")
    assert large.server.complete([5, 6]).status_code == 200
    process = dying_trainer(large, "inside")
    # Attaching is refused while the update is open.
    with large.bridge() as bridge, pytest.raises(UpdateInProgress):
        bridge.get_trainable_model()
    kill(process)
    wait_until(lambda: large.server.status()["state"] == "DIRTY")
    assert "lease" in large.server.status()["reason"]
    assert large.server.complete([5, 6]).status_code == 503
    with large.bridge() as bridge:
        bridge.get_trainable_model()
        with bridge.update():
            pass
    assert large.server.complete([5, 6]).status_code == 200


def dying_trainer(large: Live, where: str) -> subprocess.Popen[str]:
    arguments = [large.server.url, str(large.folder), where]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.test_bridge", *arguments],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "there"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert process.stdout is not None
    process.stdout.close()


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_lease_that_ended_is_told(large: Live) -> None:
    with large.bridge() as bridge:
        bridge.get_trainable_model()
        with pytest.raises((NoUpdate, EngineDirty)), bridge.update(lease_s=0.5):
            wait_until(lambda: large.server.status()["state"] == "DIRTY")
        with bridge.update():
            pass
        assert bridge.status()["state"] == "IDLE"


def test_sleep_is_refused_while_a_trainer_is_attached(large: Live) -> None:
    with large.bridge() as bridge:
        bridge.get_trainable_model()
        response = large.server.http.post("/sleep", params={"level": 1})
        assert response.status_code == 409
        assert "trains on these weights" in response.json()["error"]
        assert large.server.complete([5, 6]).status_code == 200
    assert large.server.http.post("/sleep", params={"level": 1}).status_code == 200
    assert large.server.http.post("/wake_up").status_code == 200


def test_requests_that_cannot_be(large: Live) -> None:
    with pytest.raises(PlanError, match="no name covers"), large.bridge() as bridge:
        bridge.attach_to_vllm_weights({"model.norm.weight": torch.empty(256, device="meta")})
    with large.bridge() as bridge:
        with pytest.raises(NoUpdate, match="attached"), bridge.update():
            pytest.fail("nobody is attached")
        with pytest.raises(RequestError, match="mode"), bridge.update(mode="fast"):  # type: ignore[arg-type]
            pytest.fail("no such mode")
        bridge.get_trainable_model()
        with pytest.raises(StateError, match="already"):
            bridge.attach_to_vllm_weights({})
    for body in ({"specs": []}, {"presence": {}}, {"what": 1}):
        assert large.server.http.post("/bridge/export_cuda_ipc", json=body).status_code == 400
    forwarded = large.server.http.post(
        "/bridge/export_cuda_ipc", json={}, headers={"X-Forwarded-For": "127.0.0.1"}
    )
    assert forwarded.status_code == 403
    assert large.server.status()["state"] == "IDLE"


def test_a_push_cannot_come_between(large: Live) -> None:
    with large.bridge() as bridge:
        bridge.get_trainable_model()
        with bridge.update():
            response = large.server.http.post("/push_weights", json=trainer(1).push())
            assert response.status_code == 409
        assert bridge.status()["state"] == "IDLE"


def test_the_server_dies(large: Live) -> None:
    """The last test of this server: the trainer is told, and its memory does not vanish."""
    own = segments(os.getpid())  # of other tests
    with large.bridge() as bridge:
        model = bridge.get_trainable_model()
        before = [p.detach().clone() for p in model.parameters()]
        os.killpg(large.server.process.pid, signal.SIGKILL)
        large.server.process.join(20)
        wait_until(lambda: engines(large.server) == [])
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        for mode in ("pause", "overlap"):
            with pytest.raises(ServerUnreachable), bridge.update(mode=mode):
                pytest.fail("the step must not run")
        with pytest.raises(ServerUnreachable):
            bridge.notify_update()
        names = segments(os.getpid()).keys() - own.keys()
    assert names
    assert [n for n in names if (Path("/dev/shm") / n).exists()] == []


def test_packed_weights_are_refused_by_name(
    checkpoint: Callable[..., Path], serve: Callable[..., Server]
) -> None:
    """Without WT_CPU_INPLACE vLLM computes with packed copies: nothing to train in place."""
    server = fleet.plain(serve, checkpoint)
    config = BridgeConfig(device="cpu", vllm_api_url=server.url)  # the model's name: the server's
    with VLLMWeightBridge(config) as bridge:
        with pytest.raises(PlanError, match="computes with another form of it") as caught:
            bridge.get_trainable_model()
        assert "proj.weight" in str(caught.value)
        assert "WT_CPU_INPLACE" in caught.value.next_step
    assert server.http.get("/bridge/status").json()["attached"] == []


def _main(url: str, folder: str, where: str) -> None:
    """A trainer that waits to be killed."""
    config = BridgeConfig(model_name=folder, device="cpu", vllm_api_url=url)
    bridge = VLLMWeightBridge(config)
    bridge.get_trainable_model()
    if where == "attached":
        print("there", flush=True)
        signal.pause()
    with bridge.update(lease_s=8):
        print("there", flush=True)
        signal.pause()


if __name__ == "__main__":
    _main(*sys.argv[1:])
