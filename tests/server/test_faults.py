"""Trainers that die and updates that fail: the engine serves whole weights or says why it does not.

killed before the first byte, or after commit    serves on, within the lease
killed in the middle                             DIRTY: 503 with the reason, heals by a push
killed amid patches                              the old bits again, within the lease
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support import fleet
from tests.support.fleet import assert_serves, paused, push, refused
from tests.support.server import Server
from tests.support.trainer import BUFFER, Json, TrainerProcess, trainer, weights
from tests.support.waiting import until
from vllm_wt_plugin import UpdateInProgress, VersionMismatch, WeightSync
from vllm_wt_plugin.errors import ServerUnreachable
from vllm_wt_plugin.trainer.patching import PatchSender
from vllm_wt_plugin.transport import shm
from vllm_wt_plugin.transport.ipc import Exporter
from vllm_wt_plugin.wire.params import ParamSpec

pytestmark = pytest.mark.server

LEASE_S = 1.5
SLACK_S = 5.0  # for a busy machine; the server looks once a second
NAMES = list(weights(1))
HALF = len(NAMES) // 2


@pytest.fixture
def server(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Iterator[Server]:
    """Serves seed 1 as version `old`; healed afterwards, so that one failure stays one."""
    server = fleet.plain(serve, checkpoint)
    push(server, 1, "old")
    yield server
    server.http.post("/abort_weight_update", json={})
    push(server, 1, "healed")
    server.http.post("/resume")
    fleet.assert_no_secrets(server)


@pytest.fixture
def twin(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Server:
    """A second server; it was started from seed 2, so that `fresh(2)` is known."""
    return fleet.guarded(serve, checkpoint)


def post(server: Server, path: str, body: Json) -> Json:
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    data: Json = response.json()
    return data


def half_written(server: Server, **start: object) -> None:
    """An open update of seed 2's weights with half of the names sent."""
    post(server, "/start_weight_update", {"owner": "half", **start})
    post(server, "/update_weights", trainer(2).part(NAMES[:HALF]))


def assert_dirty(server: Server, *reasons: str) -> None:
    """Says so and why wherever one can look, and does not resume."""
    status = server.status()
    assert status["state"] == "DIRTY"
    assert paused(server)
    for text in reasons:
        assert text in status["reason"]
    refused(server.complete([5, 6, 7]), 503, "EngineDirty", "push a complete dense", *reasons)
    refused(server.http.post("/resume"), 503, "EngineDirty", "resume is refused", *reasons)
    assert paused(server)
    assert server.http.get("/health").status_code == 200


# ---- the trainer is killed ----------------------------------------------------------------


def test_killed_before_the_first_byte(server: Server) -> None:
    """A request that came meanwhile is answered when the lease ends; nobody has to resume."""
    with TrainerProcess(server.url, 2, f"start:{LEASE_S}") as victim:
        assert server.status()["owner"] == "the killed trainer"
        assert paused(server)
        victim.kill()
    begun = time.monotonic()
    answer = server.complete([5, 6, 7, 8])  # queues until the engine resumes by itself
    assert answer.status_code == 200
    assert time.monotonic() - begun < LEASE_S + SLACK_S
    assert_serves(server, 1, "old")


def test_killed_in_the_middle(server: Server, twin: Server) -> None:
    said = "the weights are DIRTY: update of the killed trainer failed"
    before = server.text().count(said)
    with TrainerProcess(server.url, 2, f"start:{LEASE_S}", f"part:0:{HALF}") as victim:
        assert server.status()["state"] == "UPDATING"
        victim.kill()
    # The server finds out by itself: nobody asks it anything meanwhile.
    assert until(lambda: server.text().count(said) > before, LEASE_S + SLACK_S)
    assert_dirty(server, "the killed trainer", "lease", "expired")
    push(server, 2, "new")
    assert_serves(server, 2, "new")


def test_killed_while_requests_wait(server: Server, twin: Server) -> None:
    """A request that was queued before DIRTY is answered by the healing weights."""
    lease_s = 3 * LEASE_S  # it must be queued by then, on a busy machine too
    with TrainerProcess(server.url, 2, f"start:{lease_s}", f"part:0:{HALF}") as victim:
        answers: list[httpx.Response] = []
        waiting = threading.Thread(target=lambda: answers.append(_complete(server)))
        waiting.start()
        victim.kill()
    assert until(lambda: server.status()["state"] == "DIRTY", lease_s + SLACK_S)
    assert waiting.is_alive()
    push(server, 2, "new")
    waiting.join(20)
    assert answers
    assert answers[0].status_code == 200
    assert answers[0].json()["choices"][0]["text"] == _complete(server).json()["choices"][0]["text"]
    assert_serves(server, 2, "new")


def _complete(server: Server) -> httpx.Response:
    """On a connection of its own, for use beside `server.http`."""
    body = {"model": "m", "prompt": [9, 8, 7], "max_tokens": 8, "temperature": 0}
    return httpx.post(server.url + "/v1/completions", json=body, timeout=30, trust_env=False)


def test_killed_amid_patches(server: Server) -> None:
    """Patches are taken back exactly; nobody is DIRTY, nobody has to resume."""
    norms = [n for n in NAMES if n.endswith("layernorm.weight")]
    post(server, "/start_weight_update", {"owner": "me"})
    post(server, "/update_weights", trainer(1).patch(*norms))
    post(server, "/finish_weight_update", {"weight_version": "patched"})
    assert server.status()["version"] == "patched"
    assert server.generations() != fleet.fresh(1)
    push(server, 1, "old")
    lease = 3 * LEASE_S  # the trainer shares its patches meanwhile
    with TrainerProcess(server.url, 1, f"start:{lease}", f"patch:{':'.join(norms)}") as victim:
        assert server.status()["state"] == "UPDATING"
        victim.kill()
    assert until(lambda: server.status()["state"] == "IDLE", lease + SLACK_S)
    assert until(lambda: not paused(server), SLACK_S)
    assert_serves(server, 1, "old")


def test_patches_that_go_wrong_are_healed_by_a_dense_push(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrupted on the way, repeated, or for weights that somebody else has replaced."""
    tensors = {n: t.clone() for n, t in weights(1).items()}
    norms = [t for n, t in tensors.items() if n.endswith("layernorm.weight")]
    load = PatchSender.load

    def corrupt(self: PatchSender, *args: Any) -> None:
        load(self, *args)
        assert self.buffer is not None
        self.buffer[self.buffer.numel() * 3 // 5] ^= 4  # among the values: a third is spare room
        self.exporter.refresh()

    with WeightSync(server.url) as sync:
        sync.push(tensors, "1", mode="auto")
        for t in norms:
            t[::2] += 1
        sent = sync.push(tensors, "2", mode="sparse")
        assert sent.bytes < sum(t.nbytes for t in norms) * 3
        assert server.generations() != fleet.fresh(1)
        sender = sync._tracker._sender
        assert sender is not None
        with pytest.raises(VersionMismatch, match="start from version '1'"):
            sender.send(sync._clients[0])  # the same once more
        assert server.status()["version"] == "2"

        for n, t in tensors.items():
            t.copy_(weights(1)[n])
        with monkeypatch.context() as m:
            m.setattr(PatchSender, "load", corrupt)
            healed = sync.push(tensors, "3", mode="sparse")
        assert healed.bytes >= sum(t.nbytes for t in tensors.values())
        assert_serves(server, 1, "3")

        push(server, 1, "somebody else's")
        norms[0][0] += 1
        assert sync.push(tensors, "4", mode="sparse").bytes >= healed.bytes
        assert sync.push(tensors, "5", mode="sparse").bytes < 1000
        assert sync.verify().ok
        assert server.status()["version"] == "5"


def test_killed_after_commit(server: Server, twin: Server) -> None:
    steps = (f"start:{LEASE_S}", f"part:0:{HALF}", f"part:{HALF}:{len(NAMES)}", "finish:new")
    with TrainerProcess(server.url, 2, *steps) as victim:
        victim.kill()
    assert_serves(server, 2, "new")
    time.sleep(LEASE_S + 1)  # the lease of an update that is over ends nothing
    assert_serves(server, 2, "new")
    push(server, 1, "newer")
    assert_serves(server, 1, "newer")


def test_orphaned_segments_are_swept(server: Server) -> None:
    def left(names: set[str]) -> set[str]:
        return names & set(os.listdir(shm.SHM_DIR))

    with (
        TrainerProcess(server.url, 2, "start:30", f"part:0:{HALF}") as alive,
        TrainerProcess(server.url, 2) as victim,
    ):
        assert left(victim.segments) == victim.segments
        victim.kill()
        Exporter().close()
        assert not left(victim.segments)
        assert left(alive.segments) == alive.segments
    Exporter().close()
    assert not left(alive.segments)


class Stopping:
    """A source that gathers, and at the tensor `at` calls `stop` instead."""

    def __init__(self, seed: int, at: int, stop: Callable[[], None]) -> None:
        self.pairs, self.at, self.stop = list(weights(seed).items()), at, stop

    def specs(self) -> tuple[ParamSpec, ...]:
        return tuple(ParamSpec(n, "bfloat16", tuple(t.shape)) for n, t in self.pairs)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for i, pair in enumerate(self.pairs):
            if i == self.at:
                self.stop()
            yield pair


def test_packed_trainer_is_killed(server: Server, twin: Server) -> None:
    with TrainerProcess(server.url, 2, f"packed:{HALF}") as victim:
        assert server.status()["state"] == "UPDATING"
        victim.kill()
    response = server.http.post("/push_weights", json=trainer(2).push())
    refused(response, 409, "UpdateInProgress", "an update of the killed trainer is open since")
    post(server, "/abort_weight_update", {})
    assert_dirty(server, "the killed trainer")
    with WeightSync(server.url, packed=True, buffer_bytes=BUFFER) as sync:
        assert sync.push(weights(2), version="new").ok
    assert_serves(server, 2, "new")


@pytest.mark.parametrize(("at", "state"), [(0, "IDLE"), (HALF, "DIRTY")])
def test_packed_trainer_fails(server: Server, at: int, state: str) -> None:
    """Its own error reaches it, and the engine does not wait for the lease."""

    def stop() -> None:
        raise ZeroDivisionError("the gather failed")

    with WeightSync(server.url, packed=True, buffer_bytes=BUFFER) as sync:
        with pytest.raises(ZeroDivisionError, match="the gather failed"):
            sync.push(Stopping(2, at, stop), version="new")
        assert server.status()["state"] == state
        if state == "DIRTY":
            assert_dirty(server, "the trainer failed while it sent packed buckets")
        else:
            assert_serves(server, 1, "old")
        assert sync.push(weights(1), version="newer").ok
    assert_serves(server, 1, "newer")


# ---- a trainer that comes too late --------------------------------------------------------


def test_a_stalled_trainer_does_not_reach_into_the_next_update(server: Server) -> None:
    """Its lease has ended and another trainer has begun: every late call of the first is refused
    and changes nothing."""
    late = post(server, "/start_weight_update", {"owner": "late", "lease_s": 0.1})["session"]
    assert until(lambda: not paused(server), SLACK_S)
    now = post(server, "/start_weight_update", {"owner": "now"})["session"]
    post(server, "/update_weights", {"session": now, **trainer(1).part(NAMES[:HALF])})
    for path, body in (
        ("/update_weights", {"session": late, **trainer(2).part()}),
        ("/update_weights", {"session": late, "update_info": {"bucket": 0}}),
        ("/finish_weight_update", {"session": late, "weight_version": "late"}),
    ):
        refused(server.http.post(path, json=body), 409, "NoUpdate", "its lease expired")
        assert server.status()["owner"] == "now"
    post(server, "/abort_weight_update", {"session": late})
    assert server.status()["owner"] == "now"
    post(server, "/update_weights", {"session": now, **trainer(1).part(NAMES[HALF:])})
    post(server, "/finish_weight_update", {"session": now, "weight_version": "now"})
    assert_serves(server, 1, "now")


# ---- an update that fails -----------------------------------------------------------------


def test_finish_with_a_parameter_missing(server: Server, twin: Server) -> None:
    post(server, "/start_weight_update", {"owner": "forgetful"})
    post(server, "/update_weights", trainer(2).part(NAMES[:-1]))
    response = server.http.post("/finish_weight_update", json={"weight_version": "new"})
    refused(response, 422, "PlanError", "1 live parameters that no name covers: lm_head.weight")
    assert_dirty(server, "forgetful", "lm_head.weight")
    assert server.status()["version"] == "old"
    push(server, 2, "new")
    assert_serves(server, 2, "new")


def test_bad_part_after_a_good_one(server: Server) -> None:
    half_written(server)
    body = trainer(2).part(NAMES[HALF:])
    body["update_info"]["names"][0] = "banana"
    response = server.http.post("/update_weights", json=body)
    refused(response, 422, "PlanError", "does not take banana")
    assert_dirty(server, "banana")


def test_heals_by_an_update_of_several_calls(server: Server, twin: Server) -> None:
    half_written(server)
    post(server, "/abort_weight_update", {})
    post(server, "/start_weight_update", {})
    assert server.status()["state"] == "UPDATING"
    refused(server.complete([5]), 503, "EngineDirty", "half")
    for names in (NAMES[HALF:], NAMES[:HALF]):
        post(server, "/update_weights", trainer(2).part(names))
    post(server, "/finish_weight_update", {"weight_version": "new"})
    assert_serves(server, 2, "new")


def test_does_not_heal_by_less_than_everything(server: Server) -> None:
    half_written(server)
    post(server, "/abort_weight_update", {"reason": "first"})
    post(server, "/start_weight_update", {})  # and aborted before anything was sent
    post(server, "/abort_weight_update", {"reason": "second"})
    assert_dirty(server, "first")
    post(server, "/start_weight_update", {})  # and finished though nothing was sent
    response = server.http.post("/finish_weight_update", json={})
    refused(response, 409, "NoUpdate", "nothing complete was written")
    assert_dirty(server, "first")
    short = trainer(2).push()  # a push that lacks a name
    short["register"]["tensors"].pop()
    refused(server.http.post("/push_weights", json=short), 422, "PlanError", "lm_head.weight")
    assert_dirty(server, "first")


# ---- abort --------------------------------------------------------------------------------


def test_abort_without_an_update(server: Server) -> None:
    assert post(server, "/abort_weight_update", {})["state"] == "IDLE"
    assert_serves(server, 1, "old")
    server.http.post("/pause?mode=keep")
    post(server, "/abort_weight_update", {})
    assert paused(server)  # the operator's pause is the operator's


def test_abort_of_a_begun_update(server: Server) -> None:
    post(server, "/start_weight_update", {"owner": "begun"})
    assert paused(server)
    assert post(server, "/abort_weight_update", {})["state"] == "IDLE"
    assert_serves(server, 1, "old")
    response = server.http.post("/update_weights", json=trainer(2).part())
    refused(response, 409, "NoUpdate", "it may have been aborted")


def test_abort_of_a_half_written_update(server: Server, twin: Server) -> None:
    half_written(server)
    told = post(server, "/abort_weight_update", {"reason": "the operator's wish"})
    assert (told["state"], told["version"]) == ("DIRTY", "old")
    assert_dirty(server, "update of half failed", "the operator's wish")
    response = server.http.post("/finish_weight_update", json={})
    refused(response, 409, "NoUpdate")
    push(server, 2, "new")
    assert_serves(server, 2, "new")


def test_a_pause_after_an_abort_stays(server: Server) -> None:
    """The watch on the aborted update's lease must not resume what it did not pause."""
    post(server, "/start_weight_update", {"lease_s": LEASE_S})
    post(server, "/abort_weight_update", {})
    server.http.post("/pause?mode=keep")
    time.sleep(LEASE_S + 1)
    assert paused(server)


# ---- pauses -------------------------------------------------------------------------------


def test_an_update_restores_the_pause_it_found(server: Server) -> None:
    server.http.post("/pause?mode=keep")
    push(server, 1, "paused")
    assert paused(server)
    post(server, "/start_weight_update", {})
    post(server, "/update_weights", trainer(1).part())
    post(server, "/finish_weight_update", {"weight_version": "still paused"})
    assert paused(server)
    post(server, "/start_weight_update", {"lease_s": 0.2})
    assert until(lambda: server.status()["state"] == "IDLE", 3)
    time.sleep(0.5)
    assert paused(server)
    assert server.http.post("/resume").status_code == 200
    assert_serves(server, 1, "still paused")


def test_no_resume_while_an_update_is_open(server: Server, twin: Server) -> None:
    """Otherwise its next part would mix the weights of a serving engine."""
    post(server, "/start_weight_update", {"owner": "begun"})
    refused(
        server.http.post("/resume"), 409, "UpdateInProgress",
        "resume is refused: an update of begun is open",
    )  # fmt: skip
    post(server, "/update_weights", trainer(2).part(NAMES[:HALF]))
    refused(server.http.post("/resume"), 503, "EngineDirty", "an update is half done")
    assert paused(server)
    post(server, "/update_weights", trainer(2).part(NAMES[HALF:]))
    post(server, "/finish_weight_update", {"weight_version": "new"})
    assert_serves(server, 2, "new")


# ---- two trainers, two servers ------------------------------------------------------------


def test_two_trainers_at_once(server: Server, twin: Server) -> None:
    """Each push is done or refused as a whole, and the last one that was done is served."""
    codes: list[int] = []

    def train(seed: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            for i in range(8):
                body = trainer(seed).push(f"{seed}.{i}")
                codes.append(http.post("/push_weights", json=body).status_code)

    threads = [threading.Thread(target=train, args=(seed,)) for seed in (1, 2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(codes) == 16
    assert set(codes) <= {200, 409}
    version = server.status()["version"]
    assert_serves(server, int(version[0]), version)


def test_weight_sync_reports_each_replica(server: Server, twin: Server) -> None:
    push(twin, 2, "old")
    post(twin, "/start_weight_update", {"owner": "somebody else"})
    with WeightSync([server.url, twin.url], token=fleet.TOKEN) as sync:
        with pytest.raises(UpdateInProgress, match="an update of somebody else is open") as info:
            sync.push(weights(2), version="new")
        report = info.value.report
        good, bad = report.replicas
        assert not report.ok
        assert (good.name, good.version, good.error) == (server.url, "new", None)
        assert bad.name == twin.url
        assert isinstance(bad.error, UpdateInProgress)
        assert twin.url in str(bad.error)
        assert f"{twin.url} FAILED" in str(report)
        assert "1 of 2 replicas" in str(report)
        assert_serves(server, 2, "new")
        post(twin, "/abort_weight_update", {})
        assert_serves(twin, 2, "old")
        assert sync.push(weights(1), version="newer").ok
        assert_serves(server, 1, "newer")
        assert_serves(twin, 1, "newer")


def test_weight_sync_with_a_server_that_is_gone(server: Server) -> None:
    with WeightSync([server.url, "http://127.0.0.1:9"], timeout_s=5) as sync:
        with pytest.raises(ServerUnreachable, match="check that the server runs") as info:
            sync.push(weights(1), version="new")
        assert [r.error is None for r in info.value.report.replicas] == [True, False]
    assert_serves(server, 1, "new")
