"""The engine API over a group (gloo, in NCCL's place): a trainer's end to workers of its own kind,
in processes, and to the product's routes; the rendezvous with vLLM's own trainers."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_wt_plugin as wt
from tests.support.forked import forked
from tests.support.ports import free_port
from tests.support.toy_replica import ToyReplica, weights
from vllm_wt_plugin.transport import pynccl
from vllm_wt_plugin.transport.backends import Member
from vllm_wt_plugin.wire.nccl import NcclInit

Engine = wt.NCCLWeightTransferEngine
PACKED = {"packed": True, "packed_buffer_size_bytes": 700, "packed_num_buffers": 3}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    """Sizes that do not divide one another, a view, an empty one, a parameter."""
    g = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(8, 5, generator=g).bfloat16(), "b": torch.arange(seed, seed + 7),
        "s": torch.randn((), generator=g), "t": torch.randn(6, 40, generator=g).t(),
        "e": torch.zeros(0, 3), "o": torch.randn(3, generator=g).to(torch.float8_e4m3fn),
        "p": torch.nn.Parameter(torch.randn(90, generator=g)),
    }  # fmt: skip


def patches(seed: int) -> list[wt.SparseWeightPatch]:
    return [
        wt.SparseWeightPatch(n, i, t.detach().reshape(-1)[i], tuple(t.shape))
        for n, t in tensors(seed).items()
        for i in [torch.arange(0, t.numel(), 2)]
    ]


def named(given: dict[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "names": list(given),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in given.values()],
        "shapes": [list(t.shape) for t in given.values()],
    }


# ---- workers of the same API -----------------------------------------------------------------


def worker(pipe: Connection, rank: int, init: dict[str, Any]) -> None:
    """Receives what it is told to, and says which tensors are not those of the seed it is told."""
    torch.set_num_threads(1)

    def load(rows: list[tuple[str, torch.Tensor]]) -> None:
        if rows[0][0] == "boom":
            raise ValueError("it does not load")
        loaded.update(rows)

    model = SimpleNamespace(load_weights=load)
    engine = Engine(None, SimpleNamespace(rank=rank, world_size=2), torch.device("cpu"), model)  # type: ignore[arg-type]
    engine.init_transfer_engine(engine.parse_init_info(init))
    while (told := pipe.recv()) is not None:
        seed, update = told
        loaded: dict[str, torch.Tensor] = {}
        got: list[wt.SparseWeightPatch] = []
        info = engine.parse_update_info(update)
        try:
            if info.update_kind == "sparse_flat":
                engine.receive_sparse_weights(info, got.extend)
                want = {p.name: p for p in patches(seed)}
                wrong = [
                    p.name
                    for p in got
                    if not torch.equal(p.indices, want.pop(p.name).indices.int())
                    or not same(p.values, tensors(seed)[p.name].detach().reshape(-1)[::2])
                ] + list(want)
            else:
                engine.receive_weights(info)
                have = tensors(seed)
                wrong = [n for n, t in have.items() if t.numel() and not same(loaded[n], t)]
        except (wt.WeightSyncError, ValueError, RuntimeError) as exc:
            pipe.send(f"{type(exc).__name__}: {exc}")
        else:
            pipe.send(wrong)
    engine.shutdown()
    engine.shutdown()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [t.detach().clone(memory_format=torch.contiguous_format).view(-1) for t in (a, b)]
    equal = torch.equal(*(t.view(torch.uint8) for t in bits))
    return (a.dtype, a.shape) == (b.dtype, b.shape) and equal


class Workers:
    """Two of them, and the trainer's end of their group."""

    def __init__(self, **init: Any) -> None:
        where = {"master_address": "127.0.0.1", "master_port": free_port(), "world_size": 3}
        self.pipes, self.processes = [], []
        for rank in (0, 1):
            mine, theirs = multiprocessing.Pipe()
            self.pipes.append(mine)
            self.processes.append(forked(worker, theirs, rank, where | {"rank_offset": 1} | init))
        self.group = Engine.trainer_init(where)

    def told(self, seed: int, update: dict[str, Any]) -> None:
        for pipe in self.pipes:
            pipe.send((seed, update))

    def said(self) -> list[Any]:
        assert all(pipe.poll(30) for pipe in self.pipes)
        return [pipe.recv() for pipe in self.pipes]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            assert process.exitcode == 0
        self.group.close()


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    made = Workers()
    yield made
    made.close()


@pytest.mark.parametrize("how", ["one by one", "dict", "dataclass", "keyword"])
@pytest.mark.parametrize("packed", [{}, PACKED])
def test_dense(workers: Workers, packed: dict[str, Any], how: str) -> None:
    seed = 3 + len(how)
    workers.told(seed, named(tensors(seed)) | packed)
    rows = iter(tensors(seed).items())
    args = {"group": workers.group, **packed}
    match how:
        case "one by one":
            Engine.trainer_send_weights(rows, workers.group, 0, None, **packed)
        case "dict":
            Engine.trainer_send_weights(rows, args)
        case "dataclass":
            Engine.trainer_send_weights(rows, wt.NCCLTrainerSendWeightsArgs(**args))
        case "keyword":
            Engine.trainer_send_weights(rows, trainer_args=args)
    assert workers.said() == [[], []]


def test_what_is_sent_of_an_item(workers: Workers) -> None:
    workers.told(5, named(tensors(5)))
    names = list(tensors(5))
    Engine.trainer_send_weights(
        ((n, None) for n in names), workers.group, post_iter_func=lambda item: tensors(5)[item[0]]
    )
    assert workers.said() == [[], []]


def test_names_are_those_of_last_time(workers: Workers) -> None:
    for seed, update in (
        (6, named(tensors(6))),
        (7, {"names": [], "dtype_names": [], "shapes": []}),
    ):
        workers.told(seed, update)
        Engine.trainer_send_weights(tensors(seed).items(), workers.group)
        assert workers.said() == [[], []]


def test_sparse(workers: Workers) -> None:
    given = patches(8)
    counts = [p.values.numel() for p in given]
    workers.told(8, named(tensors(8)) | {"update_kind": "sparse_flat", "num_updates_list": counts})
    Engine.trainer_send_sparse_weights(iter(given), {"group": workers.group})
    assert workers.said() == [[], []]
    empty = {"update_kind": "sparse_flat", "num_updates_list": [0] * len(given)}
    workers.told(8, named(tensors(8)) | empty)
    assert all(len(wrong) == len([c for c in counts if c]) for wrong in workers.said())


def test_a_load_that_fails_ends_the_group() -> None:
    """What is still under way would be taken for the next update's."""
    made = Workers()
    given = {"boom": torch.ones(3), "more": torch.ones(4), "most": torch.ones(5)}
    made.told(4, named(given))
    with contextlib.suppress(wt.TransferError):  # it may be through by then
        Engine.trainer_send_weights(given.items(), made.group)
    assert made.said() == ["ValueError: it does not load"] * 2
    made.told(4, named(tensors(4)))
    assert all("not initialized" in said for said in made.said())
    made.close()


def test_a_trainer_that_goes_leaves_no_worker_waiting() -> None:
    """What init says of packing holds for updates that say nothing."""
    made = Workers(**PACKED)
    made.told(4, named(tensors(4)))
    Engine.trainer_send_weights(tensors(4).items(), made.group, **PACKED)
    assert made.said() == [[], []]
    made.told(4, named(tensors(4)))
    made.group.close()
    for said in made.said():
        assert said.startswith("TransferError: bucket 1 of 2 did not arrive")
    made.told(4, named(tensors(4)))
    for said in made.said():
        assert "not initialized" in said  # the group is over
    made.close()


# ---- arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "group"),
        ({"group": None}, "group is required"),
        ({"group": object(), "src": 1}, "src must be 0"),
        ({"group": object(), "packed_num_buffers": 0}, "must be positive, got 1073741824 and 0"),
        ({"group": object(), "packed_buffer_size_bytes": 0}, "must be positive, got 0 and 2"),
        ({"group": object(), "color": 1}, "Invalid trainer_args.*color"),
    ],
)
def test_arguments_that_do_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Engine.trainer_send_weights(iter(()), given)
    with pytest.raises(ValueError, match=says):
        Engine.trainer_send_weights(iter(()), **given)
    with pytest.raises(ValueError, match=says):
        Engine.trainer_send_sparse_weights(iter(()), given)


def test_patches_are_not_packed() -> None:
    with pytest.raises(ValueError, match="patches are not packed"):
        Engine.trainer_send_sparse_weights(iter(()), {"group": object(), "packed": True})
    with pytest.raises(ValueError, match="patches are not packed"):
        wt.IPCWeightTransferEngine.trainer_send_sparse_weights(
            iter(()), {"mode": "http", "url": "u", "packed": True}
        )


def test_a_group_that_vllm_has_turned_off() -> None:
    off = SimpleNamespace(disabled=True, rank=0, world_size=2)
    with pytest.raises(wt.TransferError, match="PyNccl is off in this process"):
        Engine.trainer_send_weights(iter(()), off)


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ({"master_address": "h", "master_port": 1}, "missing.*rank_offset.*world_size"),
        ({"master_address": "h", "rank_offset": 1, "world_size": 2}, "give master_address and"),
        (
            {"nccl_unique_id_b64": "eA==", "master_port": 1, "rank_offset": 1, "world_size": 2},
            "give master_address and",
        ),
        ({"master_address": "h", "master_port": 1, "color": 1}, "color"),
    ],
)
def test_an_init_that_cannot_be_parsed(init: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid init_info for NCCLWeight.*: .*{says}"):
        Engine(None, None).parse_init_info(init)


def test_an_engine_that_cannot_meet() -> None:
    engine = Engine(None, SimpleNamespace(rank=1), torch.device("cpu"))
    where = {"master_address": "127.0.0.1", "master_port": 1, "rank_offset": 1}
    with pytest.raises(ValueError, match="would be rank 2 of a group of 2"):
        engine.init_transfer_engine(engine.parse_init_info(where | {"world_size": 2}))
    id_alone = {"nccl_unique_id_b64": "eA==", "rank_offset": 1, "world_size": 3}
    with pytest.raises(wt.RequestError, match="for engines on GPUs"):
        engine.init_transfer_engine(engine.parse_init_info(id_alone))
    for kind, receive in (
        ({}, lambda info: engine.receive_weights(info, print)),
        (
            {"update_kind": "sparse_flat", "num_updates_list": [1]},
            lambda info: engine.receive_sparse_weights(info, print),
        ),
    ):
        engine._init = NcclInit(1, 3, "h", 1)
        info = engine.parse_update_info(named({"b": torch.arange(3)}) | kind)
        with pytest.raises(RuntimeError, match="NCCL weight transfer not initialized"):
            receive(info)
        other = engine.receive_weights if kind else engine.receive_sparse_weights
        with pytest.raises(ValueError, match=r"receive_(sparse_)?weights takes it"):
            other(info, print)
    with pytest.raises(ValueError, match="no update has named any before"):
        engine.receive_weights(engine.parse_update_info(named({})), print)
    with pytest.raises(ValueError, match="Invalid init_info: 'master_port' is missing"):
        Engine.trainer_init({"master_address": "127.0.0.1", "world_size": 2})
    engine.shutdown()


# ---- to the product's routes -----------------------------------------------------------------


class Route:
    """A program written for vLLM's API: its requests by hand, its bytes by the engine class."""

    group: Any = None

    def __init__(self, replica: ToyReplica) -> None:
        self.replica = replica
        self.meet()

    def meet(self) -> None:
        """Another group than the one before."""
        self.close()
        where = {"master_address": "127.0.0.1", "master_port": free_port(), "world_size": 3}
        init = {"init_info": where | {"rank_offset": 1}}
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(self.post, "init_weight_transfer_engine", init)
            self.group = Engine.trainer_init(wt.NCCLWeightTransferInitInfo(**where, rank_offset=1))
            asked.result()

    def close(self) -> None:
        if self.group is not None:
            self.group.close()

    def post(self, path: str, body: Any = None) -> None:
        response = self.replica.http.post(f"/{path}", json=body)
        if response.status_code != 200:
            raise RuntimeError(response.text)

    def update(self, info: dict[str, Any], send: Any) -> None:
        with ThreadPoolExecutor(1) as beside:
            asked = beside.submit(self.post, "update_weights", {"update_info": info})
            try:
                send()
            except wt.TransferError:
                asked.result()  # says why
                raise
            asked.result()

    def dense(self, given: dict[str, torch.Tensor], version: str, **packed: Any) -> None:
        self.post("start_weight_update", {"is_checkpoint_format": True})
        info = named(given) | packed
        self.update(info, lambda: Engine.trainer_send_weights(given.items(), self.group, **packed))
        self.post("finish_weight_update", {"weight_version": version})

    def sparse(self, given: list[wt.SparseWeightPatch], **more: Any) -> None:
        info = {
            "names": [p.name for p in given], "update_kind": "sparse_flat",
            "dtype_names": [str(p.values.dtype).removeprefix("torch.") for p in given],
            "shapes": [list(p.full_shape or ()) for p in given],
            "num_updates_list": [p.values.numel() for p in given],
        }  # fmt: skip
        args = {"group": self.group}
        self.update(info | more, lambda: Engine.trainer_send_sparse_weights(given, args))


@pytest.fixture(scope="module")
def route() -> Iterator[Route]:
    with ToyReplica(world=2) as replica:
        made = Route(replica)
        yield made
        made.close()


def differing(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> Any:
    for n, t in old.items():
        i = (t.view(-1) != new[n].view(-1)).nonzero().view(-1)
        yield wt.SparseWeightPatch(n, i, new[n].view(-1)[i], tuple(t.shape))


@pytest.mark.parametrize("packed", [{}, PACKED])
def test_dense_into_the_routes(route: Route, packed: dict[str, Any]) -> None:
    for seed in (2, 3):
        route.dense(weights(seed), f"v{seed}", **packed)
        assert route.replica.serves(seed, f"v{seed}")


def test_patches_into_the_routes(route: Route) -> None:
    """From mixed weights to those of one seed, in two calls of one update; what takes no patches,
    or is held in another dtype, has them from the start."""
    new = weights(3)
    patched = {n: t for n, t in weights(2).items() if "fused" in n and "v_proj.weight" not in n}
    route.dense(new | patched, "mixed")
    given = list(differing(patched, new))
    route.post("start_weight_update")
    for half in (given[:9], given[9:]):
        route.sparse(half)
    assert not route.replica.serves(3, "mixed")
    route.post("finish_weight_update", {"weight_version": "patched"})
    assert route.replica.serves(3, "patched")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"indices": torch.tensor([1, 1])}, "index 1 is given twice"),
        ({"indices": torch.tensor([1, 144])}, "index 144 of 144 elements"),
        ({"name": "nowhere"}, "no such tensor"),
        ({"full_shape": (12, 13)}, "the patch is for shape"),
    ],
)
def test_patches_that_are_refused(route: Route, change: dict[str, Any], says: str) -> None:
    """Nothing is written and nobody waits: the group ends, the next update has another one."""
    route.dense(weights(3), "before")
    name = "fused.layers.0.q_proj.weight"
    good = {"name": name, "indices": torch.tensor([1, 2]), "values": torch.ones(2).bfloat16(),
            "full_shape": (12, 12)}  # fmt: skip
    route.post("start_weight_update")
    with pytest.raises(RuntimeError, match=says):
        route.sparse([wt.SparseWeightPatch(**(good | change))])
    assert route.replica.serves(3, "before")
    route.meet()
    route.dense(weights(2), "after")
    assert route.replica.serves(2, "after")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"num_updates_list": None}, "`num_updates_list` is missing"),
        ({"num_updates_list": []}, "`num_updates_list` is empty"),
        ({"num_updates_list": [-1]}, "num_updates_list"),
        ({"num_updates_list": [1, 2]}, "`num_updates_list` should be of the same size"),
        ({"update_kind": "diagonal"}, "Invalid enum value 'diagonal'"),
        ({"update_kind": "dense"}, "`num_updates_list` is for sparse updates"),
        ({"packed": True}, "patches are not packed"),
    ],
)
def test_updates_that_make_no_sense(route: Route, more: dict[str, Any], says: str) -> None:
    route.post("start_weight_update")
    info = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]], "num_updates_list": [1],
            "update_kind": "sparse_flat"}  # fmt: skip
    response = route.replica.http.post("/update_weights", json={"update_info": info | more})
    assert (response.status_code, says in response.text) == (400, True), response.text
    route.post("abort_weight_update", {})
    assert route.replica.status()["state"] == "IDLE"


# ---- vLLM's own rendezvous -------------------------------------------------------------------


class Made:
    """What vLLM's communicator says of itself."""

    disabled = False

    def __init__(self, unique_id: bytes, rank: int, world_size: int, device: torch.device) -> None:
        self.unique_id, self.rank, self.world_size = unique_id, rank, world_size

    def destroy(self) -> None:
        pass


def vllms_trainer(port: int, go: threading.Event, *, on: bool) -> None:
    """What `trainer_init` does before NCCL itself; with its PyNccl off it sends no id."""
    utils = pytest.importorskip("vllm.distributed.utils")
    wrapper = pytest.importorskip("vllm.distributed.device_communicators.pynccl_wrapper")
    group = utils.StatelessProcessGroup.create("127.0.0.1", port, 0, 3)
    if on:
        unique_id = wrapper.ncclUniqueId()
        unique_id.internal[5] = 77
        group.broadcast_obj(unique_id, 0)
    go.wait(20)


def met(port: int, rank: int, rendezvous_s: float, stop: threading.Event) -> Any:
    init = NcclInit(1, 3, "127.0.0.1", port, rendezvous_s=rendezvous_s)
    made: list[Made] = []

    def load() -> pynccl.Make:
        return lambda *args: made.append(Made(*args)) or made[0]  # type: ignore[func-returns-value]

    group = pynccl.meet(init, rank, torch.device("cuda", 0), stop, load)
    assert (group.rank, group.world_size) == (rank, 3)
    return made[0].unique_id


def test_vllms_own_store_and_id() -> None:
    pytest.importorskip("vllm.distributed.utils")
    port, go, stop = free_port(), threading.Event(), threading.Event()
    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(met, port, rank, 30, stop) for rank in (1, 2)]
        trainer = pool.submit(vllms_trainer, port, go, on=True)
        ids = [w.result() for w in workers]
        go.set()
        trainer.result()
    assert ids == [bytes([*[0] * 5, 77, *[0] * 122])] * 2


def test_a_trainer_whose_pynccl_is_off_is_told_from_one_that_is_not_there() -> None:
    pytest.importorskip("vllm.distributed.utils")
    port, go, stop = free_port(), threading.Event(), threading.Event()
    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(met, port, rank, 1.5, stop) for rank in (1, 2)]
        trainer = pool.submit(vllms_trainer, port, go, on=False)
        for w in workers:
            with pytest.raises(wt.NotJoined, match=r"sent no NCCL id.*VLLM_NCCL_SO_PATH"):
                w.result()
        go.set()
        trainer.result()
    with pytest.raises(wt.NotJoined, match="nobody answered"):
        met(free_port(), 1, 0.2, stop)


def test_a_rendezvous_ends_when_it_is_told_to() -> None:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(met, free_port(), 1, 60, stop)
        start = time.monotonic()
        stop.set()
        with pytest.raises(wt.TransferError, match="aborted"):
            waiting.result()
    assert time.monotonic() - start < 20


def test_without_nccl_nobody_waits() -> None:
    def load() -> pynccl.Make:
        raise wt.UnsupportedVLLM("vLLM cannot use the NCCL it finds: too old")

    init = NcclInit(1, 3, "127.0.0.1", free_port(), rendezvous_s=60)
    with pytest.raises(wt.UnsupportedVLLM, match="too old"):
        pynccl.meet(init, 1, torch.device("cuda", 0), threading.Event(), load)


def test_the_group_of_who_names_none() -> None:
    """What a payload of vLLM's leads to on a machine without GPUs."""
    port = free_port()
    at = Member(host="127.0.0.1", port=port, group=pynccl.UNNAMED, rank=1, world_size=2)
    with ThreadPoolExecutor(1) as pool:
        init = NcclInit(1, 2, at.host, port, rendezvous_s=30)
        cpu = torch.device("cpu")
        other = pool.submit(
            pynccl.meet, init, 1, cpu, threading.Event(), lambda: pytest.fail("no NCCL here")
        )
        mine = Engine.trainer_init(
            {"master_address": at.host, "master_port": port, "world_size": 2}
        )
        assert (mine.rank, other.result().rank) == (0, 1)
    mine.close()
    other.result().close()
