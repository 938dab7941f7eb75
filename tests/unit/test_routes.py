"""Callers that do not end what they began, at the real routes in front of toy workers."""

from __future__ import annotations

import logging
import socket
import time

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute

from tests.support.trainer import Trainer as Shared
from tests.unit.test_session import Trainer
from tests.unit.toy_server import ToyEngine, ToyServer
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.server.plugin import _put_first

HEAD = "POST {} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}"


def begin(server: ToyServer, path: str, content: bytes, length: int) -> socket.socket:
    url = httpx.URL(server.url)
    peer = socket.create_connection((url.host, url.port or 80), timeout=10)
    peer.sendall(f"{HEAD.format(path, length)}\r\n\r\n".encode() + content)
    return peer


@pytest.mark.parametrize("path", ["/push_weights", "/update_weights", "/start_weight_update"])
def test_a_client_that_hangs_up_amid_its_body(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is done, and the log has a line of it, not a traceback."""
    caplog.set_level(logging.INFO, "vllm.wt.server")
    with ToyServer(ToyEngine()) as server:
        before = server.engine.weights()
        begin(server, path, b'{"owner": "', 1000).close()
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [(r.levelname, r.getMessage()) for r in caplog.records if "wt" in r.name] == [
            ("INFO", f"weight sync: {path}: the client hung up")
        ]
        assert httpx.get(server.url + "/weight_transfer_status").json()["state"] == "IDLE"
        assert server.engine.weights() == before


def test_a_slow_body_keeps_nobody_waiting() -> None:
    with ToyServer(ToyEngine()) as server:
        content = b'{"owner": "slow"}'
        with begin(server, "/start_weight_update", content[:5], len(content)) as slow:
            started = httpx.post(server.url + "/start_weight_update", json={"owner": "quick"})
            assert started.status_code == 200
            assert httpx.post(server.url + "/abort_weight_update", json={}).status_code == 200
            slow.sendall(content[5:])
            assert slow.recv(100).startswith(b"HTTP/1.1 200")
        assert httpx.get(server.url + "/weight_transfer_status").json()["owner"] == "slow"


def test_a_wrong_init_reaches_no_worker() -> None:
    """It is refused with its place, and what trainers have registered stays."""
    with ToyServer(ToyEngine()) as server, WeightSync(server.url) as sync:
        sync.push(Trainer(2).tensors)
        for info in ({"packed": 2**64}, {"world_size": 2**64}):
            answer = httpx.post(
                f"{server.url}/init_weight_transfer_engine", json={"init_info": info}
            )
            assert (answer.status_code, answer.json()["code"]) == (400, "RequestError"), answer.text
        assert httpx.get(server.url + "/weight_transfer_status").json()["registrations"]


def test_a_broadcast_of_no_update() -> None:
    with ToyServer(ToyEngine()) as server:
        body = {"update_info": {"broadcast": True}}
        answer = httpx.post(f"{server.url}/update_weights", json=body)
        assert (answer.status_code, answer.json()["code"]) == (409, "NoUpdate"), answer.text


def test_a_list_has_an_update_for_each_worker_by_global_rank() -> None:
    """vLLM 0.33's form. Each rank takes its own; a list of another length is refused."""
    with ToyServer(ToyEngine(ranks=2)) as server:
        post = httpx.Client(base_url=server.url, timeout=30).post
        trainers = [Shared(Trainer(seed).tensors) for seed in (2, 3)]
        infos = [t.part()["update_info"] for t in trainers]
        for path, body in (
            ("/start_weight_update", {"is_checkpoint_format": True}),
            ("/update_weights", {"update_info": infos}),
            ("/finish_weight_update", {"weight_version": "apart"}),
        ):
            assert post(path, json=body).status_code == 200
        assert [w.holds(s) for w in server.engine.workers for s in (2, 3)] == [1, 0, 0, 1]
        assert post("/start_weight_update").status_code == 200
        for wrong in (infos[:1] * 3, []):
            said = post("/update_weights", json={"update_info": wrong})
            assert (said.status_code, said.json()["code"]) == (400, "RequestError")
            assert f"a list of {len(wrong)}, there are 2 workers" in said.text
        for trainer in trainers:
            trainer.close()


def test_weights_in_another_form_than_a_checkpoints_are_refused() -> None:
    with ToyServer(ToyEngine()) as server:
        said = httpx.post(server.url + "/start_weight_update", json={"is_checkpoint_format": False})
        assert said.status_code == 400
        assert "is_checkpoint_format must be true" in said.text
        assert httpx.get(server.url + "/weight_transfer_status").json()["state"] == "IDLE"


def test_ours_come_first_and_replace_what_they_answer() -> None:
    """Others of the same path, with another method, stay."""
    app, router = FastAPI(), APIRouter()
    for path, method in (("/a", "GET"), ("/b", "POST"), ("/b", "GET"), ("/c", "GET")):
        app.add_api_route(path, lambda: "theirs", methods=[method])
    known = list(app.router.routes)
    for path, method in (("/b", "POST"), ("/c", "GET")):
        router.add_api_route(path, lambda: "ours", methods=[method])
    app.include_router(router)
    _put_first(app, known)
    found = [(r.path, *r.methods) for r in app.router.routes if isinstance(r, APIRoute)]
    assert found == [("/b", "POST"), ("/c", "GET"), ("/a", "GET"), ("/b", "GET")]
