"""Broadcasts to real processes that run toy models, over gloo: what arrives, and every way to fail.

What counts: a push that fails leaves every replica with the old weights or DIRTY, and says so;
the next push makes a new group by itself and heals them, on either side of whatever died.
"""

from __future__ import annotations

import base64
import importlib.util
import os
import pickle  # noqa: TID251 (what vLLM writes, to be read without it)
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import toy_trainer
from tests.support.ports import free_port
from tests.support.toy_replica import ToyReplica, weights
from tests.support.toy_trainer import BUFFER, Faulty
from tests.support.waiting import stopped, until
from tests.unit.toys import specs_of
from vllm_wt_plugin import (
    NotJoined,
    PlanError,
    RequestError,
    ServerUnreachable,
    TransferError,
    UpdateInProgress,
    WeightSync,
)
from vllm_wt_plugin.trainer import broadcast
from vllm_wt_plugin.trainer.source import MappingSource
from vllm_wt_plugin.transport.backends import Member
from vllm_wt_plugin.transport.group import join, listen
from vllm_wt_plugin.transport.nccl import Sender
from vllm_wt_plugin.transport.pynccl import ID_BYTES, UNNAMED, given, read_id
from vllm_wt_plugin.wire.buckets import cut_as_vllm, size
from vllm_wt_plugin.wire.nccl import SAMPLE, checked
from vllm_wt_plugin.wire.params import ParamSpec

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")


@pytest.fixture(scope="module")
def pair() -> Iterator[list[ToyReplica]]:
    """A replica of one worker and one of two."""
    with ToyReplica() as one, ToyReplica(world=2) as two:
        yield [one, two]


def connect(*replicas: ToyReplica, **options: Any) -> WeightSync:
    options = {"buffer_bytes": BUFFER, "timeout_s": 20.0, "rendezvous_s": 10.0} | options
    return WeightSync([r.url for r in replicas], backend="nccl", **options)


def all_serve(replicas: list[ToyReplica], seed: int, version: str) -> bool:
    return all(r.serves(seed, version) and not r.paused() for r in replicas)


def test_one_broadcast_reaches_all_ranks_of_all_replicas(pair: list[ToyReplica]) -> None:
    with connect(*pair) as sync:
        for i, seed in enumerate((2, 3, 2)):
            report = sync.push(weights(seed), version=f"v{seed}")
            assert all_serve(pair, seed, f"v{seed}")
            # The first one announces; then each replica is asked once.
            assert ("start" in report.seconds, "finish" in report.seconds) == (i == 0, i == 0)
        assert report.ok
        assert [r.version for r in report.replicas] == ["v2", "v2"]


def test_replicas_meet_once(pair: list[ToyReplica], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers first."""
    met = []

    def counted(*args: Any) -> Any:
        met.append(meet(*args))
        return met[-1]

    meet = broadcast.meet
    monkeypatch.setattr(broadcast, "meet", counted)
    with connect(*pair) as sync:
        slow = sync._clients[0].status
        sync._clients[0].status = lambda: time.sleep(0.2) or slow()  # type: ignore[method-assign]
        for seed in (2, 3):
            sync.push(weights(seed))
    assert len(met) == 1


@pytest.mark.parametrize(
    "options", [{"packed": False}, {"verify": "off"}, {"buffer_bytes": 1 << 20}]
)
def test_other_ways_to_send_give_the_same_bits(
    pair: list[ToyReplica], options: dict[str, Any]
) -> None:
    with connect(*pair, **options) as sync:
        for seed in (3, 2):
            sync.push(weights(seed), version=f"v{seed}")
            assert all_serve(pair, seed, f"v{seed}")


def test_a_sample_covers_every_tensor_in_turn() -> None:
    for n in (1, 5, 100):
        specs = [ParamSpec(str(i), "float32", (1,)) for i in range(n)]
        rounds = [checked(specs, "sample", r) for r in range(7, 7 + SAMPLE)]
        assert {n for names in rounds for n in names} == {s.name for s in specs}
        assert all(0 < len(names) <= n // SAMPLE + 1 for names in rounds)
        assert checked(specs, "full", 3) == [s.name for s in specs]
        assert checked(specs, "off", 3) == []


def test_the_status_answers_and_an_abort_ends_a_transfer(pair: list[ToyReplica]) -> None:
    class Waiting(Faulty):
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for i, row in enumerate(MappingSource.__iter__(self)):
                if i == 20 and self.fault != "none":
                    reached.set()
                    go.wait(20)
                yield row

    reached, go = threading.Event(), threading.Event()
    source = Waiting(weights(3))
    source.fault = "wait"
    raised: list[BaseException] = []

    def push() -> None:
        try:
            sync.push(source)
        except TransferError as exc:
            raised.append(exc)

    with connect(*pair) as sync:
        sync.push(weights(2), version="v2")
        thread = threading.Thread(target=push)
        thread.start()
        assert reached.wait(15)
        start = time.monotonic()
        assert {r.status()["state"] for r in pair} == {"UPDATING"}
        body = {"reason": "an operator says so"}
        assert pair[0].http.post("/abort_weight_update", json=body).status_code == 200
        assert until(lambda: all(r.status()["state"] == "DIRTY" for r in pair))
        assert time.monotonic() - start < 8
        go.set()
        thread.join(15)
        assert "an operator says so" in str(raised[0])
        source.fault = "none"
        sync.push(source, version="v3")
        assert all_serve(pair, 3, "v3")


class Lying(Faulty):
    """Announces its tensors, and yields something else from the middle on."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        rows = list(MappingSource.__iter__(self))
        middle = len(rows) // 2
        if self.fault == "fewer":
            rows = rows[:middle]
        elif self.fault == "more":
            rows.append(("extra", torch.ones(3)))
        elif self.fault == "other":
            rows[middle] = ("other", rows[middle][1])
        return iter(rows)


@pytest.mark.parametrize("lie", ["fewer", "more", "other"])
def test_a_source_that_breaks_its_word_ends_the_update(pair: list[ToyReplica], lie: str) -> None:
    source = Lying(weights(3))
    with connect(*pair) as sync:
        sync.push(weights(2), version="v2")
        source.fault = lie
        with pytest.raises(RequestError, match=r"announced|ended before"):
            sync.push(source)
        # On a busy machine a replica may not have begun to write.
        assert all(r.status()["state"] == "DIRTY" or r.serves(2, "v2") for r in pair)
        source.fault = "none"
        sync.push(source, version="v3")
        assert all_serve(pair, 3, "v3")


def test_a_source_that_can_be_walked_for_nothing_is_checked_before_a_byte_moves(
    pair: list[ToyReplica],
) -> None:
    class Lists(Lying):
        def memory(self) -> Any:
            return []

    source = Lists(weights(3))
    source.fault = "fewer"
    with connect(*pair) as sync:
        sync.push(weights(2), version="v2")
        with pytest.raises(PlanError):
            sync.push(source)
        assert all_serve(pair, 2, "v2")


def test_what_no_replica_can_take_is_refused_before_a_byte_moves(pair: list[ToyReplica]) -> None:
    with connect(*pair) as sync:
        sync.push(weights(2), version="v2")
        with pytest.raises(PlanError):
            sync.push({"no.such.weight": torch.ones(3)})
        assert all_serve(pair, 2, "v2")
        sync.push(weights(3), version="v3")
        assert all_serve(pair, 3, "v3")


def test_a_replica_that_refuses_a_later_push_leaves_all_as_they_were(
    pair: list[ToyReplica],
) -> None:
    """No bucket is sent before all of them have begun."""
    with connect(*pair) as sync:
        sync.push(weights(2), version="v2")
        for refusing in pair:
            refusing.http.post("/start_weight_update", json={"owner": "somebody"})
            with pytest.raises(UpdateInProgress, match="somebody"):
                sync.push(weights(3), version="v3")
            refusing.http.post("/abort_weight_update", json={})
            assert until(lambda: all_serve(pair, 2, "v2"))
        sync.push(weights(3), version="v3")
        assert all_serve(pair, 3, "v3")


def test_a_port_that_is_taken(pair: list[ToyReplica]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            connect(*pair, port=taken.getsockname()[1]) as sync,
            pytest.raises(RequestError, match="no group can meet"),
        ):
            sync.push(weights(3))
    assert {r.status()["state"] for r in pair} == {"IDLE"}


@pytest.mark.parametrize(
    ("wrong", "status", "text"),
    [
        ({"world_size": 2, "rank_offset": 2}, 400, "this worker would be rank 2"),
        ({"group": None}, 400, "needs `master_address`"),
        ({"rank_offset": "one"}, 400, "Expected `int`"),
        ({"rendezvous_s": 1.0}, 500, "nobody answered"),
    ],
)
def test_an_init_that_cannot_work(
    pair: list[ToyReplica], wrong: dict[str, Any], status: int, text: str
) -> None:
    with socket.socket() as s:  # bound, not listening: nobody answers there
        s.bind(("127.0.0.1", 0))
        info = {
            "master_address": "127.0.0.1", "master_port": s.getsockname()[1], "rank_offset": 1,
            "world_size": 3, "communicator": "torch", "group": "ab" * 16,
        }  # fmt: skip
        response = pair[1].http.post(
            "/init_weight_transfer_engine", json={"init_info": info | wrong}
        )
    assert (response.status_code, text in response.text) == (status, True), response.text


def test_a_rank_that_never_joins_is_named(pair: list[ToyReplica]) -> None:
    """The replica answers for two workers, its group waits for three."""
    with connect(*pair, rendezvous_s=8.0) as sync:
        status = sync._clients[1].status
        sync._clients[1].status = lambda: status() | {"world_size": 3}  # type: ignore[method-assign]
        with pytest.raises((NotJoined, ServerUnreachable), match="4"):
            sync.push(weights(3))
        sync._clients[1].status = status  # type: ignore[method-assign]
        sync.push(weights(3), version="v3")
        assert all_serve(pair, 3, "v3")


@pytest.mark.parametrize("fault", ["kill:12", "leave:12"])
def test_a_trainer_that_dies_in_the_middle(pair: list[ToyReplica], fault: str) -> None:
    with connect(*pair) as sync:
        sync.push(weights(2), version="v2")
        process = toy_trainer.start([r.url for r in pair], 3, 60.0, fault)
        out, _ = process.communicate(timeout=60)
        assert "there" in out
        if fault == "kill:12":
            assert process.returncode == -signal.SIGKILL
        assert until(lambda: all(r.status()["state"] == "DIRTY" for r in pair))
        sync.push(weights(2), version="healed")
        assert all_serve(pair, 2, "healed")


def test_a_trainer_that_stands_still_past_the_deadline(pair: list[ToyReplica]) -> None:
    """Both sides end by themselves; when it goes on, it pushes again and exits cleanly."""
    process = toy_trainer.start([r.url for r in pair], 3, 4.0, "stop:12")
    try:
        assert until(lambda: stopped(process.pid), 60)
        assert until(lambda: all(r.status()["state"] == "DIRTY" for r in pair), 40)
        # Whose deadline passes first ends it for the others; on a slow machine the trainer's own.
        reasons = [r.status()["reason"] for r in pair]
        late = "did not arrive: nothing came from rank 0 within 4 s"
        assert any(late in why or "Connection closed" in why for why in reasons), reasons
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=40)
    finally:
        process.kill()
    assert "TransferError" in out or "ServerUnreachable" in out
    assert out.endswith("pushed\n")
    assert process.returncode == 0
    assert all_serve(pair, 3, "process 3")


@pytest.mark.full  # importing DTensor twice takes longer than all else here
def test_a_trainer_of_two_ranks(pair: list[ToyReplica]) -> None:
    """Both gather, rank 0 sends; one that is refused walks on, so that the ranks stay in step."""
    port = free_port()
    urls = [r.url for r in pair]
    ranks = [toy_trainer.start(urls, 3, 20.0, f"sharded:{r}:{port}") for r in range(2)]
    said = [p.communicate(timeout=240)[0] for p in ranks]
    assert said == ["PlanError\n4 pushed to 2\n", "4 pushed to 0\n"]
    assert [p.returncode for p in ranks] == [0, 0]
    assert all_serve(pair, 3, "sharded")


@pytest.mark.parametrize("fault", ["kill:2", "stop:2", "kill:2:1", "stop:2:1"])
def test_one_of_three_replicas_is_lost_in_the_middle(pair: list[ToyReplica], fault: str) -> None:
    with ToyReplica(fault) as third, connect(pair[0], third, pair[1], timeout_s=3.0) as sync:
        if fault.endswith(":1"):  # of a later push
            sync.push(weights(2), version="v2")
        with pytest.raises(ServerUnreachable) as caught:
            sync.push(weights(3))
        assert third.url in str(caught.value)
        assert "bucket" in str(caught.value)
        errors = [r.error for r in caught.value.report.replicas]
        assert all(third.url in str(e) for e in errors)
        sync.remove(third.url)
        sync.push(weights(2), version="v2")
        assert all_serve(pair, 2, "v2")


def test_a_lost_replica_is_left_out_where_that_is_asked_for(pair: list[ToyReplica]) -> None:
    with (
        ToyReplica("kill:2") as third,
        connect(pair[0], third, pair[1], on_replica_error="drop") as sync,
    ):
        report = sync.push(weights(3), version="v3")
        assert [r.error is None for r in report.replicas] == [True, False, True]
        assert all_serve(pair, 3, "v3")
        assert len(sync.push(weights(2), version="v2").replicas) == 2
        assert all_serve(pair, 2, "v2")


@pytest.mark.parametrize("pushes", [0, 1])
def test_a_sender_that_fails_in_the_middle(
    pair: list[ToyReplica], monkeypatch: pytest.MonkeyPatch, pushes: int
) -> None:
    def breaks(self: Any, nbytes: int) -> None:
        if self._begun == 5:
            raise TransferError("out of luck")
        send(self, nbytes)

    send = Sender.send
    with connect(*pair) as sync:
        for _ in range(pushes):
            sync.push(weights(2), version="v2")
        with monkeypatch.context() as m:
            m.setattr(Sender, "send", breaks)
            with pytest.raises(TransferError, match="out of luck"):
                sync.push(weights(3), version="v3")
        assert until(lambda: all(r.status()["state"] == "DIRTY" for r in pair))
        sync.push(weights(3), version="v3")
        assert all_serve(pair, 3, "v3")


@pytest.mark.parametrize("later", [0, 1])
def test_a_flipped_bit_is_not_committed(pair: list[ToyReplica], later: int) -> None:
    """In the first push, or one that is a request; the other replica has the new weights."""
    with ToyReplica(f"flip:2:{later}") as third, connect(pair[0], third, verify="full") as sync:
        for seed in [2] * later:
            sync.push(weights(seed), version="v2")
        with pytest.raises(TransferError, match="checksum of 1 tensors") as caught:
            sync.push(weights(3), version="v3")
        assert [r.error is None for r in caught.value.report.replicas] == [True, False]
        assert pair[0].serves(3, "v3")
        status = third.status()
        assert (status["state"], status["version"]) == ("DIRTY", "v2" if later else "default")
        assert "checksum" in status["reason"]
        sync.push(weights(2), version="v2")
        assert all_serve([pair[0], third], 2, "v2")


def vllms(module: str) -> Any:
    """One of vLLM's own files, without all that its package imports."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    path = Path(spec.submodule_search_locations[0], "distributed/weight_transfer", module)
    own = importlib.util.spec_from_file_location("vllms_own", path)
    assert own is not None
    assert own.loader is not None
    made = importlib.util.module_from_spec(own)
    own.loader.exec_module(made)
    return made


def their_chunks(tensors: dict[str, torch.Tensor], nbytes: int) -> list[Any]:
    pack, rows = vllms("packed_tensor.py").pack_tensors, iter(tensors.items())
    return list(iter(lambda: pack(rows, lambda row: row[1], nbytes), None))


@pytest.mark.filterwarnings("ignore:Tensor")
@pytest.mark.parametrize("nbytes", [1, 64, 700, 1200, 1 << 20])
def test_buckets_are_vllms_own(nbytes: int) -> None:
    tensors = weights(2)
    mine = cut_as_vllm(specs_of(tensors), nbytes)
    theirs = their_chunks(tensors, nbytes)
    assert [[p.spec.name for p in b] for b in mine] == [c.names for c in theirs]
    assert [size(b) for b in mine] == [c.packed_tensor.numel() for c in theirs]
    for bucket, chunk in zip(mine, theirs, strict=True):
        for p in bucket:
            have = chunk.packed_tensor[p.offset : p.offset + p.nbytes].clone()
            want = tensors[p.spec.name]
            assert torch.equal(have.view(want.dtype).view(want.shape), want)


class TheirTrainer:
    """vLLM's `NCCLTrainerWeightTransferEngine` on gloo: its requests, its order, its buckets."""

    def __init__(self, replica: ToyReplica, *, packed: bool) -> None:
        self.http, self.packed = replica.http, packed
        store = listen("127.0.0.1")
        at = Member(host="127.0.0.1", port=store.port, group=UNNAMED, rank=0, world_size=3)
        info = {
            "master_address": at.host, "master_port": at.port, "rank_offset": 1, "world_size": 3,
            "packed": packed, "packed_buffer_size_bytes": BUFFER, "packed_num_buffers": 2,
        }  # fmt: skip
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(self.post, "init_weight_transfer_engine", {"init_info": info})
            self.group = join(at, torch.device("cpu"), 20, threading.Event(), store)
            asked.result()

    def post(self, path: str, body: Any = None) -> None:
        response = self.http.post(f"/{path}", json=body)
        assert response.status_code == 200, response.text

    def send(self, tensors: dict[str, torch.Tensor], *, named: bool = True) -> None:
        self.post("start_weight_update")
        self.update(tensors, named=named)
        self.post("finish_weight_update", {"weight_version": "theirs"})

    def update(self, tensors: dict[str, torch.Tensor], *, named: bool = True) -> None:
        info = {"names": [], "dtype_names": [], "shapes": []}
        if named:
            info = {
                "names": list(tensors),
                "dtype_names": [str(t.dtype).split(".")[-1] for t in tensors.values()],
                "shapes": [list(t.shape) for t in tensors.values()],
            }
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(self.post, "update_weights", {"update_info": info})
            if self.packed:
                parts = [c.packed_tensor for c in their_chunks(tensors, BUFFER)]
            else:
                parts = [t.contiguous().view(-1).view(torch.uint8) for t in tensors.values()]
            for part in parts:
                pending = self.group.broadcast(part, 20)
                assert until(pending.done)
            asked.result()


@pytest.mark.parametrize("packed", [True, False])
def test_vllms_own_trainer(pair: list[ToyReplica], packed: bool) -> None:
    trainer = TheirTrainer(pair[1], packed=packed)
    trainer.send(weights(3))
    assert pair[1].serves(3, "theirs")
    trainer.send(weights(2), named=False)  # as last time
    assert pair[1].serves(2, "theirs")
    trainer.group.close()


@pytest.mark.parametrize("packed", [True, False])
def test_vllms_own_trainer_may_send_an_update_in_parts(
    pair: list[ToyReplica], packed: bool
) -> None:
    trainer = TheirTrainer(pair[1], packed=packed)
    for seed in (3, 2):
        rows = list(weights(seed).items())
        trainer.post("start_weight_update")
        for part in rows[:3], rows[3:-1], rows[-1:]:
            trainer.update(dict(part))
        trainer.post("finish_weight_update", {"weight_version": f"parts of {seed}"})
        assert pair[1].serves(seed, f"parts of {seed}")
    trainer.post("start_weight_update")
    trainer.update(dict(rows[:3]))
    response = trainer.http.post("/finish_weight_update", json={})
    assert "no name covers" in response.text
    assert pair[1].status()["state"] == "DIRTY"
    trainer.send(weights(3))
    assert pair[1].serves(3, "theirs")
    trainer.group.close()


def test_the_id_in_vllms_store_is_read_without_unpickling() -> None:
    wrapper = pytest.importorskip("vllm.distributed.device_communicators.pynccl_wrapper")
    made = wrapper.ncclUniqueId()
    for i in range(ID_BYTES):
        made.internal[i] = i % 100
    assert read_id(pickle.dumps(made)) == bytes(i % 100 for i in range(ID_BYTES))
    for odd in (b"", b"no pickle", pickle.dumps([1, b"short"])):
        with pytest.raises(TransferError, match="no NCCL id"):
            read_id(odd)
    text = base64.b64encode(bytes(range(ID_BYTES))).decode()
    assert given(text) == bytes(range(ID_BYTES))
    for odd_text in (text[:-4], "*" * 172, ""):
        with pytest.raises(RequestError, match="128 bytes"):
            given(odd_text)


def test_a_replica_that_was_started_anew_is_met_again(pair: list[ToyReplica]) -> None:
    with connect(*pair) as sync, connect(*pair) as other:
        sync.push(weights(2), version="v2")
        other.push(weights(3), version="v3")  # its group takes the first one's place
        sync.push(weights(2), version="v2")
        assert all_serve(pair, 2, "v2")
