"""The plugin in vLLM: broken on purpose, left out, over two ranks, and what it tells the log."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import fleet, sabotage
from tests.support.fleet import assert_serves, paused, push, refused
from tests.support.server import Server
from tests.support.trainer import Json, Trainer, trainer, weights
from tests.support.waiting import until
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.errors import ServerUnreachable, WeightSyncError
from vllm_wt_plugin.transport import shm

pytestmark = pytest.mark.server

NAMES = list(weights(1))
HALF = len(NAMES) // 2
PLUGINS = "wt,sabotage"


# ---- broken, or not asked for -------------------------------------------------------------


def assert_vllm_alone(server: Server) -> None:
    """Healthy, answering, and without a route of ours."""
    assert server.http.get("/health").status_code == 200
    assert server.complete([5, 6, 7]).status_code == 200
    for path in ("/push_weights", "/abort_weight_update"):
        assert server.http.post(path, json={}).status_code == 404
    assert server.http.get("/weight_transfer_status").status_code == 404
    with WeightSync(server.url) as sync, pytest.raises(ServerUnreachable, match="VLLM_PLUGINS=wt"):
        sync.push(weights(1))


def lines(server: Server, text: str) -> list[str]:
    return [line for line in server.text().splitlines() if text in line]


def log(tmp_path: Path) -> Path:
    return tmp_path / "server.log"


def test_register_raises(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM keeps its own backend, and in dev mode its own routes."""
    env = fleet.DEV | sabotage.environment(tmp_path / "plugin", "register")
    model = checkpoint("qwen3", 1)
    with Server(model, log(tmp_path), env=env, plugins=PLUGINS, anew=True) as server:
        assert_vllm_alone(server)
        said = lines(server, "vllm_wt_plugin is off, vLLM's own weight transfer stays in use: ")
        assert all("sabotage: register" in line for line in said)
        processes = {m[1] for x in said if (m := re.match(r"\((\w+)", x))}
        every = {m[1] for m in re.finditer(r"^\((\w+)", server.text(), re.M)}
        assert {"EngineCore", "VllmWorker"} & every <= processes  # 0.30: no process of the worker
        assert len(lines(server, "no weight routes are served")) == 1
        # vLLM's own lifecycle, on its own engine: the one that was ours already is given back.
        assert lines(server, "Creating weight transfer engine: IPCWeightTransferEngine")
        http = server.http
        assert http.get("/weight_info").json() == {"weight_version": "default"}
        assert http.post("/init_weight_transfer_engine", json={"init_info": {}}).status_code == 200
        assert http.post("/pause?mode=keep").status_code == 200
        assert http.post("/resume").status_code == 200
        assert server.complete([5, 6, 7]).status_code == 200


@pytest.mark.full
def test_a_version_that_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """One clear line in each process; the backend, and in dev mode the routes, are vLLM's own."""
    env = fleet.DEV | sabotage.environment(tmp_path / "plugin", "version")
    with Server(checkpoint("qwen3", 1), log(tmp_path), env=env, plugins=PLUGINS) as server:
        assert_vllm_alone(server)
        said = lines(server, "vLLM 0.28.9 is not supported on CPU Next: install vLLM >= ")
        assert {line.split("vllm_wt_plugin")[1].split(":")[0] for line in said} == {
            " is off, vLLM's own weight transfer stays in use",
            "",
        }
        assert len(lines(server, "no weight routes are served")) == 1
        http = server.http
        assert http.post("/init_weight_transfer_engine", json={"init_info": {}}).status_code == 200
        assert http.get("/get_world_size").json() == {"world_size": 1}
        assert "upstream_ipc" not in server.text()


@pytest.mark.full
def test_import_error(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    env = sabotage.environment(tmp_path / "plugin", "import")
    with Server(checkpoint("qwen3", 1), log(tmp_path), env=env, plugins=PLUGINS) as server:
        assert_vllm_alone(server)
        assert lines(server, "Failed to load plugin wt")  # vLLM's words, in every process
        assert len(lines(server, "no weight routes are served")) == 1


@pytest.mark.full
def test_attach_router_raises(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """No route of ours stays behind: it would lack its access rules."""
    env = sabotage.environment(tmp_path / "plugin", "attach")
    with Server(checkpoint("qwen3", 1), log(tmp_path), env=env, plugins=PLUGINS) as server:
        assert_vllm_alone(server)
        said = lines(server, "vllm_wt_plugin: no weight routes are served: ")
        assert len(said) == 1
        assert "AccessMiddleware" in said[0]


@pytest.mark.full
@pytest.mark.parametrize("plugins", [None, "other"])
def test_plugin_not_named(
    checkpoint: Callable[..., Path], tmp_path: Path, plugins: str | None
) -> None:
    """As if it were not installed; unset, vLLM loads general plugins but no endpoint plugins."""
    with Server(checkpoint("qwen3", 1), log(tmp_path), plugins=plugins, anew=True) as server:
        assert_vllm_alone(server)
        assert not lines(server, "are ours")
        assert bool(lines(server, "VLLM_PLUGINS does not name wt")) == (plugins is None)


@pytest.mark.full
def test_unusable_token(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A token that cannot be used must not mean: no token needed."""
    with Server(checkpoint("qwen3", 1), log(tmp_path), env={"WT_TOKEN": ""}) as server:
        assert_vllm_alone(server)
        said = lines(server, "no weight routes are served: the token is empty")
        assert len(said) == 1
        assert "WT_TOKEN" in said[0]


@pytest.mark.full
@pytest.mark.parametrize("backend", [None, "upstream_nccl", "upstream_ipc"])
def test_other_backends(
    checkpoint: Callable[..., Path], tmp_path: Path, backend: str | None
) -> None:
    """Not ours: no routes, and what our wrappers see passes through untouched."""
    model = checkpoint("qwen3", 1)
    with Server(model, log(tmp_path), env=fleet.DEV, backend=backend) as server:
        assert_vllm_alone(server)
        assert server.http.post("/sleep").status_code == 200
        assert server.http.post("/wake_up").json()["status"] == "awake"
        assert server.http.post("/pause?mode=keep").status_code == 200
        assert server.http.post("/resume").status_code == 200
        assert server.complete([5, 6, 7]).status_code == 200


# ---- two ranks ----------------------------------------------------------------------------


class Pair:
    """A server of two ranks, and a switch that makes a call fail once on rank 1."""

    def __init__(self, server: Server, flags: Path) -> None:
        self.server, self.flags = server, flags

    def fail(self, name: str) -> None:
        (self.flags / name).touch()

    def failed(self, name: str) -> bool:
        return not (self.flags / name).exists()


@pytest.fixture(scope="module")
def pair(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    env = fleet.DEV | sabotage.environment(folder / "plugin")
    model = checkpoint("qwen3", 1)
    with Server(model, folder / "server.log", env=env, plugins=PLUGINS, tp=2) as server:
        yield Pair(server, folder / "plugin")
        fleet.assert_no_secrets(server)


@pytest.fixture
def two(pair: Pair) -> Iterator[Pair]:
    """Serves seed 1 as `old`; afterwards no reply is shifted and a push goes through."""
    push(pair.server, 1, "old")
    yield pair
    for version in ("healed", "again"):
        push(pair.server, 1, version)
        assert pair.server.status()["version"] == version
    assert pair.server.status()["state"] == "IDLE"
    assert not paused(pair.server)


def ranks(server: Server) -> list[Json]:
    """Each rank's own state, by dev mode's rpc: a refused verb tells it as well."""
    response = server.http.post("/collective_rpc", json={"method": "weight_sync", "args": ["x"]})
    return [r["state"] for r in response.json()["results"]]


def test_one_rank_fails_before_the_first_byte(two: Pair) -> None:
    server = two.server
    expected = server.generations()
    body = trainer(2).push("new")
    two.fail("open")
    response = server.http.post("/push_weights", json=body)
    assert two.failed("open")
    refused(response, 500, "TransferError", "sabotage: open", "rank 1")
    # The next calls get their own replies.
    status = server.status()
    assert (status["state"], status["version"], status["world_size"]) == ("IDLE", "old", 2)
    assert server.http.get("/weight_info").json() == {"weight_version": "old"}
    assert [(r["phase"], r["version"]) for r in ranks(server)] == [("IDLE", "old")] * 2
    assert not paused(server)
    assert server.generations() == expected
    assert server.http.post("/push_weights", json=body).json()["version"] == "new"
    assert [(r["phase"], r["version"]) for r in ranks(server)] == [("IDLE", "new")] * 2
    assert server.generations() != expected


@pytest.mark.parametrize("how", ["push", "parts"])
def test_one_rank_fails_while_writing(two: Pair, how: str) -> None:
    """Rank 0 has committed by then; both are DIRTY until a push is whole again."""
    server = two.server
    expected = server.generations()
    if how == "parts":
        server.http.post("/start_weight_update", json={}).raise_for_status()
        server.http.post("/update_weights", json=trainer(2).part()).raise_for_status()
        two.fail("finish")
        response = server.http.post("/finish_weight_update", json={"weight_version": "new"})
    else:
        two.fail("finish")
        response = server.http.post("/push_weights", json=trainer(2).push("new"))
    assert two.failed("finish")
    refused(response, 500, "TransferError", "sabotage: finish", "rank 1")
    assert [r["phase"] for r in ranks(server)] == ["DIRTY", "DIRTY"]
    assert all("sabotage: finish" in r["reason"] for r in ranks(server))
    refused(server.complete([5]), 503, "EngineDirty", "sabotage: finish")
    refused(server.http.post("/resume"), 503, "EngineDirty", "resume is refused")
    push(server, 1, "old")
    assert [(r["phase"], r["version"]) for r in ranks(server)] == [("IDLE", "old")] * 2
    assert not paused(server)
    assert server.generations() == expected


def test_caches_that_cannot_be_dropped(two: Pair) -> None:
    """The weights are new but may not be served with old KV; the next push also resumes."""
    server = two.server
    two.fail("reset_prefix_cache")
    response = server.http.post("/push_weights", json=trainer(2).push("new"))
    assert two.failed("reset_prefix_cache")
    refused(response, 500, "TransferError", "the prefix cache could not be reset", "push again")
    assert [r["phase"] for r in ranks(server)] == ["DIRTY", "DIRTY"]
    refused(server.complete([5]), 503, "EngineDirty", "could not be dropped")
    push(server, 1, "old")
    assert not paused(server)
    assert server.complete([5]).status_code == 200


def test_larger_than_both_ranks_take(two: Pair) -> None:
    """Each rank alone takes a part of every tensor: only together do they see the rest."""
    import torch

    name = "model.layers.0.self_attn.q_proj.weight"
    changed = weights(2) | {name: torch.zeros(129, 64, dtype=torch.bfloat16)}
    with Trainer(changed) as other:
        response = two.server.http.post("/push_weights", json=other.push())
    refused(response, 422, "PlanError", f"larger than what the served model takes of them: {name}")
    assert [(r["phase"], r["version"]) for r in ranks(two.server)] == [("IDLE", "old")] * 2


def test_lease_of_two_ranks(two: Pair) -> None:
    """The ranks' clocks differ by microseconds; the engine resumes all the same."""
    for _ in range(5):
        two.server.http.post("/start_weight_update", json={"lease_s": 0.1}).raise_for_status()
        assert until(lambda: not paused(two.server), 20)
    assert [(r["phase"], r["version"]) for r in ranks(two.server)] == [("IDLE", "old")] * 2


# ---- dev mode and secrets -----------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {"args": ["weight_sync"]},
        {"args": [[146, 129, 164]]},
        {"args": [{"verb": "abort", "session": "", "reason": ""}]},
        {"args": []},
        {"args": ["a", "b"]},
        {"kwargs": {"payload": "x"}},
        {"kwargs": {"bogus": "x"}},
    ],
)
def test_dev_rpc_cannot_drive_the_verbs(two: Pair, call: Json) -> None:
    """JSON has no bytes; and refusing is a reply, so that no rank's reply is left over."""
    body = {"method": "weight_sync", **call}
    response = httpx.post(two.server.url + "/collective_rpc", json=body, timeout=60)
    assert response.status_code == 200, response.text
    for reply in response.json()["results"]:
        assert reply["error"]["error"] == "weight sync verbs are internal"
        assert reply["state"]["phase"] == "IDLE"
    assert_old(two)


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("update_weights", {}),
        ("update_weights", {"args": [{}]}),
        ("update_weights", {"args": [[]]}),
        ("update_weights", {"kwargs": {"update_info": {"names": "x"}}}),
        ("start_weight_update", {"args": ["x"]}),
        ("finish_weight_update", {}),
        ("finish_weight_update", {"kwargs": {"bogus": 1}}),
    ],
)
def test_dev_rpc_with_nonsense_for_the_lifecycle(two: Pair, method: str, call: Json) -> None:
    body = {"method": method, **call}
    response = httpx.post(two.server.url + "/collective_rpc", json=body, timeout=60)
    assert response.status_code == 500
    assert_old(two)


def assert_old(two: Pair) -> None:
    status = two.server.status()
    assert (status["state"], status["version"], status["world_size"]) == ("IDLE", "old", 2)
    assert [(r["phase"], r["version"]) for r in ranks(two.server)] == [("IDLE", "old")] * 2


@pytest.fixture
def guarded(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Iterator[Server]:
    server = fleet.guarded(serve, checkpoint)
    push(server, 2, "old")
    yield server
    server.http.post("/abort_weight_update", json={})
    push(server, 2, "healed")


def test_no_secret_in_the_log(guarded: Server) -> None:
    """After everything that fails: neither the token, nor a segment's name, nor a body."""
    http = guarded.http
    body = trainer(1).push()
    names = {s["name"] for s in body["register"]["storages"]}
    gone, short, torn = trainer(1).push(), trainer(1).push(), trainer(1).push()
    gone["register"]["storages"][0]["name"] = "/wt_" + "b" * 32
    short["register"]["storages"][0]["nbytes"] = 2**47
    torn["register"]["storages"][0] |= {"extra": fleet.TOKEN}
    for bad in (gone, short, torn, {"registration": fleet.TOKEN}, fleet.TOKEN):
        assert http.post("/push_weights", json=bad).status_code == 400
    http.post("/push_weights", json=body, headers={"Authorization": "Bearer other-secret"})
    http.post("/start_weight_update", json={}).raise_for_status()
    http.post("/update_weights", json=trainer(1).part(NAMES[:HALF])).raise_for_status()
    http.post("/finish_weight_update", json={})
    for path in ("/wake_up", "/collective_rpc"):
        rpc = {"method": "update_weights", "args": [trainer(1).part()["update_info"]]}
        headers = {"Authorization": f"Bearer {fleet.TOKEN}"}
        httpx.post(guarded.url + path, json=rpc, headers=headers, timeout=60)
    with WeightSync(guarded.url, token=fleet.TOKEN) as sync:
        sync.push(weights(1))
        for storage in sync._exporter._registration.storages:  # type: ignore[union-attr]
            names.add(storage.name)  # type: ignore[union-attr]
            os.unlink(shm.SHM_DIR + storage.name)  # type: ignore[union-attr]
        with pytest.raises(WeightSyncError) as told:
            sync.push(weights(1))
    text = guarded.text()
    for secret in {n.strip("/") for n in names} | {fleet.TOKEN, "other-secret", "b" * 32}:
        assert secret not in text
        assert secret not in str(told.value)
    assert body["registration"] not in text
    fleet.assert_no_secrets(guarded)


def test_status_needs_the_token_too(guarded: Server) -> None:
    """It names registrations, by which a push can be made."""
    status: dict[str, Any] = guarded.status()
    assert status["registrations"]
    assert httpx.get(guarded.url + "/weight_transfer_status").status_code == 401
    assert_serves(guarded, 2, "old")
