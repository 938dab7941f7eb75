"""What requests see of a push: none fails, each token is one version's, no cache is stale."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import fleet
from tests.support.fleet import assert_serves, paused, push, refused
from tests.support.server import Generation, Server
from tests.support.trainer import Json, Trainer, speaking, trainer, weights
from tests.support.waiting import until
from vllm_wt_plugin import WeightSync

pytestmark = pytest.mark.server

OLD, NEW, LAST = {40, 41}, {50, 51}, {60, 61}  # the only tokens that the versions say
STREAMS = 32
LONG = [(i * 37 + 11) % 250 + 10 for i in range(200)]  # more than one block of KV cache
HALF = len(weights(1)) // 2


@pytest.fixture
def server(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Iterator[Server]:
    server = fleet.plain(serve, checkpoint)
    yield server
    push(server, 1, "restored")
    fleet.assert_no_secrets(server)


@pytest.fixture
def twin(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Server:
    """In vLLM's dev mode, with a token; started from seed 2."""
    return fleet.guarded(serve, checkpoint)


# ---- requests under way -------------------------------------------------------------------


class Stream:
    """One streamed request: its tokens, and (by the generate route) whose they are.

    It ends when weights are pushed that say LAST: minutes of tokens would be left otherwise.
    """

    def __init__(self, url: str, number: int) -> None:
        self.url, self.number = url, number
        self.tokens: list[int] = []
        self.versions: list[Json] | None = None
        self.finish = ""
        self.flowing = asyncio.Event()  # some tokens came

    async def run(self, http: httpx.AsyncClient) -> None:
        prompt = [self.number + 5, 7, 9]
        options: Json = {"max_tokens": 60_000, "temperature": 0, "ignore_eos": True}
        options["stop_token_ids"] = sorted(LAST)
        if self.number % 2:
            path = "/inference/v1/generate"
            body: Json = {"token_ids": prompt, "stream": True, "sampling_params": options}
        else:
            path = "/v1/completions"
            body = {"model": "m", "prompt": prompt, "stream": True, "return_token_ids": True}
            body |= options
        async with http.stream("POST", self.url + path, json=body) as response:
            assert response.status_code == 200
            async for choice in _choices(response):
                self.tokens += choice["token_ids"] or []
                self.finish = choice["finish_reason"] or self.finish
                self.versions = choice.get("weight_versions") or self.versions
                self.flowing.set()


async def _choices(response: httpx.Response) -> AsyncIterator[Json]:
    async for line in response.aiter_lines():
        text = line.removeprefix("data: ")
        if text and text != "[DONE]":
            data = json.loads(text)
            assert "error" not in data, data
            for choice in data["choices"]:
                yield choice


def generate(server: Server, prompt: list[int]) -> Json:
    """One request by the route that tells versions."""
    options = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = {"token_ids": prompt, "sampling_params": options}
    response = server.http.post("/inference/v1/generate", json=body)
    assert response.status_code == 200, response.text
    choice: Json = response.json()["choices"][0]
    return choice


def assert_whole(server: Server, version: str, tokens: set[int]) -> None:
    for number in range(3):
        choice = generate(server, [number + 5, 7, 9])
        assert set(choice["token_ids"]) <= tokens
        assert choice["weight_versions"] == [{"version": version, "start": 0, "end": 12}]


def assert_streams_meet(server: Server, update: Callable[[], None]) -> None:
    """STREAMS requests flow, `update` makes the weights new, and then they are pushed that end
    the requests: every token is one version's, in that order, and labelled so."""

    async def stream() -> list[Stream]:
        limits = httpx.Limits(max_connections=STREAMS)
        async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as http:
            streams = [Stream(server.url, n) for n in range(STREAMS)]
            tasks = [asyncio.create_task(s.run(http)) for s in streams]
            flowing = asyncio.gather(*(s.flowing.wait() for s in streams))
            await asyncio.wait([flowing, *tasks], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(asyncio.to_thread(then), *tasks)
            return streams

    def then() -> None:
        update()
        assert_whole(server, "new", NEW)  # in one batch with the streams
        server.http.post("/push_weights", json=last.push("last")).raise_for_status()

    with Trainer(speaking(1, *OLD)) as old, Trainer(speaking(1, *LAST)) as last:
        server.http.post("/push_weights", json=old.push("old")).raise_for_status()
        assert_whole(server, "old", OLD)
        streams = asyncio.run(stream())
        assert_whole(server, "last", LAST)
    assert not paused(server)
    for s in streams:
        runs = [(says, len(list(run))) for says, run in itertools.groupby(s.tokens, _version)]
        assert s.finish == "stop"
        assert [says for says, _ in runs] == ["old", "new", "last"]
        assert runs[2][1] == 1
        if s.number % 2:
            ends = list(itertools.accumulate(n for _, n in runs))
            assert s.versions == [
                {"version": says, "start": end - n, "end": end}
                for (says, n), end in zip(runs, ends, strict=True)
            ]


def _version(token: int) -> str:
    return next(v for v, says in (("old", OLD), ("new", NEW), ("last", LAST)) if token in says)


def test_push_while_requests_stream(server: Server) -> None:
    with Trainer(speaking(1, *NEW)) as new:
        body = new.push("new")
        assert_streams_meet(
            server, lambda: server.http.post("/push_weights", json=body).raise_for_status()
        )


def test_update_of_several_calls_while_requests_stream(server: Server) -> None:
    """The engine is paused from start to finish, so half-new weights make no token."""
    with Trainer(speaking(2, *NEW)) as new:

        def update() -> None:
            for path, body in (
                ("/start_weight_update", {}),
                ("/update_weights", new.part(new.names[HALF:])),  # `lm_head` is new from here on
                ("/update_weights", new.part(new.names[:HALF])),
                ("/finish_weight_update", {"weight_version": "new"}),
            ):
                server.http.post(path, json=body).raise_for_status()
                time.sleep(0.1)

        assert_streams_meet(server, update)


def test_a_trainer_that_hangs_up(server: Server) -> None:
    """Its push is done to its end: nobody is left to resume the engine otherwise."""
    url = httpx.URL(server.url)
    content = json.dumps(trainer(1).push("hung up")).encode()
    head = (
        f"POST /push_weights HTTP/1.1\r\nHost: 127.0.0.1:{url.port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )

    def arrived() -> bool:
        return bool(server.status()["version"] == "hung up")

    async def hang_up() -> None:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            stream = Stream(server.url, 1)
            task = asyncio.create_task(stream.run(http))
            await stream.flowing.wait()  # so that the push takes its steps one by one
            with socket.create_connection((url.host, url.port or 80)) as peer:
                peer.sendall(head.encode() + content)
            assert await asyncio.to_thread(until, arrived, 20)
            task.cancel()

    asyncio.run(hang_up())
    assert_serves(server, 1, "hung up")


# ---- caches -------------------------------------------------------------------------------


def cache_hits(server: Server) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(x.split()[-1]) for x in lines if x.startswith("vllm:prefix_cache_hits_total"))


def answer(server: Server, prompt: list[int]) -> Generation:
    response = server.complete(prompt, logprobs=2, ignore_eos=True)
    assert response.status_code == 200, response.text
    logprobs: Any = response.json()["choices"][0]["logprobs"]
    return logprobs["tokens"], logprobs["token_logprobs"]


@pytest.mark.parametrize("how", ["push", "parts"])
def test_prefix_cache_never_serves_old_kv(server: Server, twin: Server, how: str) -> None:
    """The prompt is answered as by a server that never saw it before."""
    prompt = [*LONG, 3 if how == "push" else 4]
    push(server, 1, "old")
    push(twin, 2, "new")
    first = answer(server, prompt)
    before = cache_hits(server)
    answer(server, prompt)
    assert cache_hits(server) > before, "the prompt must be cached for this test to mean anything"
    if how == "push":
        push(server, 2, "new")
    else:
        for path, body in (
            ("/start_weight_update", {}),
            ("/update_weights", trainer(2).part()),
            ("/finish_weight_update", {"weight_version": "new"}),
        ):
            server.http.post(path, json=body).raise_for_status()
    before = cache_hits(server)
    assert answer(server, prompt) == answer(twin, prompt) != first
    assert cache_hits(server) == before


# ---- sleep --------------------------------------------------------------------------------


@pytest.fixture
def sleeper(twin: Server) -> Iterator[Server]:
    """Serves seed 2 as `before`; woken and healed afterwards."""
    push(twin, 2, "before")
    yield twin
    twin.http.post("/wake_up")
    twin.http.post("/abort_weight_update", json={})
    push(twin, 2, "healed")
    twin.http.post("/resume")


def test_push_to_a_sleeping_engine(sleeper: Server, server: Server) -> None:
    """Refused until the weights are awake; then done, without resuming before the KV cache is."""
    http = sleeper.http
    assert http.post("/sleep").status_code == 200
    assert sleeper.status()["asleep"] == ["kv_cache", "weights"]
    for path, body in (("/push_weights", trainer(1).push()), ("/start_weight_update", {})):
        refused(
            http.post(path, json=body), 409, "EngineAsleep", "the weights are asleep",
            'wake_up(["weights"])',
        )  # fmt: skip
        assert sleeper.status()["state"] == "IDLE"
    assert http.post("/wake_up?tags=weights").json()["status"] == "sleeping"
    assert sleeper.status()["asleep"] == ["kv_cache"]
    push(sleeper, 1, "new")
    assert paused(sleeper)
    assert http.post("/wake_up?tags=kv_cache").json()["status"] == "awake"
    assert sleeper.status()["asleep"] == []
    assert_serves(sleeper, 1, "new")


def test_update_of_several_calls_while_the_kv_cache_sleeps(sleeper: Server, server: Server) -> None:
    http = sleeper.http
    http.post("/sleep")
    http.post("/wake_up?tags=weights")
    for path, body in (
        ("/start_weight_update", {}),
        ("/update_weights", trainer(1).part()),
        ("/finish_weight_update", {"weight_version": "new"}),
    ):
        http.post(path, json=body).raise_for_status()
    assert paused(sleeper)
    http.post("/wake_up")
    assert_serves(sleeper, 1, "new")


def test_sleep_amid_an_update(sleeper: Server) -> None:
    """The next part is refused, the update ends, and nothing resumes a sleeping engine."""
    http = sleeper.http
    http.post("/start_weight_update", json={}).raise_for_status()
    http.post("/sleep").raise_for_status()
    refused(http.post("/update_weights", json=trainer(1).part()), 409, "EngineAsleep", "asleep")
    assert sleeper.status()["state"] == "IDLE"
    assert paused(sleeper)
    http.post("/wake_up").raise_for_status()
    assert_serves(sleeper, 2, "before")


def test_waking_does_not_resume_mixed_weights(sleeper: Server, server: Server) -> None:
    http = sleeper.http
    http.post("/start_weight_update", json={"owner": "half"}).raise_for_status()
    http.post("/update_weights", json=trainer(1).part(trainer(1).names[:HALF])).raise_for_status()
    http.post("/abort_weight_update", json={}).raise_for_status()
    http.post("/sleep").raise_for_status()
    response = httpx.post(sleeper.url + "/wake_up", timeout=60)  # vLLM closes after a 500
    assert response.status_code == 500
    assert "resume is refused: the weights are DIRTY: update of half failed" in response.text
    assert paused(sleeper)
    refused(sleeper.complete([5]), 503, "EngineDirty", "half")
    push(sleeper, 1, "new")
    assert_serves(sleeper, 1, "new")


# ---- repetition ---------------------------------------------------------------------------


@pytest.mark.full
def test_a_hundred_pushes_amid_requests(server: Server, twin: Server) -> None:
    """Two trainers' worth of pushes under load leave no request, memory or state behind."""

    async def load(url: str, stop: asyncio.Event) -> int:
        done = 0
        async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
            while not stop.is_set():
                body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 20, "temperature": 0}
                (await http.post(url + "/v1/completions", json=body)).raise_for_status()
                done += 1
        return done

    async def train(url: str) -> int:
        stop = asyncio.Event()
        tasks = [asyncio.create_task(load(url, stop)) for _ in range(8)]
        with WeightSync(url) as sync:
            for i in range(100):
                seed = 2 if i % 2 else 1
                report = await asyncio.to_thread(sync.push, weights(seed), f"{i}")
                assert report.ok
        stop.set()
        return sum(await asyncio.gather(*tasks))

    assert asyncio.run(train(server.url)) > 50
    assert_serves(server, 2, "99")
