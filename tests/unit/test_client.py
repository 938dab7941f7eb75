"""The HTTP client against a real socket: what it sends, and what becomes of each kind of answer."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from vllm_wt_plugin.errors import (
    EngineDirty,
    RequestError,
    ServerUnreachable,
    TransferError,
    WeightSyncError,
)
from vllm_wt_plugin.trainer.client import HTTPClient


class Echo(BaseHTTPRequestHandler):
    """Answers /echo with what it was sent, /dirty with an error of ours, and so on."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        sent = {
            "headers": dict(self.headers),
            "body": body.decode(),
            "port": self.client_address[1],
        }
        answers: dict[str, tuple[int, bytes]] = {
            "/echo": (200, json.dumps(sent).encode()),
            "/once": (200, json.dumps(sent).encode()),
            "/dirty": (503, json.dumps(EngineDirty("torn", where="rank 1").to_dict()).encode()),
            "/list": (200, b"[]"),
            "/broken": (500, b"\xff oh"),
        }
        status, content = answers.get(self.path, (404, b"{}"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = self.path == "/once"  # without saying so, as an idle server does

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None: ...


class Server6(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture(params=["127.0.0.1", "::1"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    six = ":" in request.param
    try:
        server = (Server6 if six else ThreadingHTTPServer)((request.param, 0), Echo)
    except OSError:
        pytest.skip("no IPv6 here")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"[{request.param}]" if six else request.param
    yield f"http://{host}:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_sends_the_host_the_token_and_json(url: str) -> None:
    client = HTTPClient(f"{url}/", token="t")
    sent: dict[str, Any] = client.post("/echo", {"a": [1]})
    assert sent["headers"]["Host"] == url.removeprefix("http://")
    assert sent["headers"]["Authorization"] == "Bearer t"
    assert sent["headers"]["Content-Type"] == "application/json"
    assert sent["body"] == '{"a":[1]}'
    bare = client.get("/echo")
    assert "Content-Type" not in bare["headers"]
    assert bare["port"] == sent["port"], "a connection for every request"


def test_connects_again_where_the_server_has_closed(url: str) -> None:
    client = HTTPClient(url)
    first = client.post("/once", {})
    time.sleep(0.3)  # a request that crosses the closing is lost, as with any client
    assert client.post("/once", {})["port"] != first["port"]


def test_answers_become_errors_that_name_the_server(url: str) -> None:
    client = HTTPClient(url)
    cases: list[tuple[str, type[WeightSyncError], str]] = [
        ("/dirty", EngineDirty, "torn"),
        ("/nowhere", ServerUnreachable, "has no /nowhere"),
        ("/list", TransferError, "answered 200"),
        ("/broken", TransferError, "oh"),
    ]
    for path, kind, text in cases:
        with pytest.raises(kind, match=text) as error:
            client.post(path, {})
        assert url in error.value.where


def test_nobody_there_and_nobody_answering() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServerUnreachable, match="GET /x"):
            HTTPClient(url).get("/x")
        silent.listen()
        with pytest.raises(ServerUnreachable, match="no answer in time") as error:
            HTTPClient(url, timeout_s=0.2).get("/x")
        assert error.value.heard


def test_threads_have_connections_of_their_own(url: str) -> None:
    client = HTTPClient(url)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: client.post("/echo", i)["body"], range(200)))
    assert answers == [str(i) for i in range(200)]
    client.close()
    assert client.post("/echo", 1)["body"] == "1"


def test_a_path_before_the_routes_is_kept(url: str) -> None:
    client = HTTPClient(f"{url}/behind/a/proxy")
    with pytest.raises(ServerUnreachable, match="has no /echo"):
        client.get("/echo")
    client.close()


@pytest.mark.parametrize("token", ["sec\nret", "secr\u00e9t"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(RequestError, match="token") as error:
        HTTPClient("http://h", token=token)
    assert "sec" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://h:1",
        "http://",
        "http://h:99999",
        "http://h:8b",
        "http://h h",
        "http://h/\n",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="not a server's address"):
        HTTPClient(url)
