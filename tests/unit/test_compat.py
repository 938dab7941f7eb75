"""The engine API as first specified: every name, default and error, and what it sends arrives."""

from __future__ import annotations

import http.server
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_wt_plugin as wt
from vllm_wt_plugin.errors import WeightSyncError

GIB = 1 << 30
LISTS: dict[str, Any] = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2, 2]]}
HANDLES: dict[str, Any] = {"ipc_handles": [{"GPU-a": (print, ())}]}
KINDS: list[Any] = [
    (wt.IPCWeightTransferUpdateInfo, HANDLES), (wt.NCCLWeightTransferUpdateInfo, {}),
]  # fmt: skip


NAMES = """
    IPCTrainerSendWeightsArgs IPCWeightTransferInitInfo IPCWeightTransferUpdateInfo
    IPCWeightTransferEngine NCCLTrainerSendWeightsArgs NCCLWeightTransferInitInfo
    NCCLWeightTransferUpdateInfo NCCLWeightTransferEngine WeightTransferEngine SparseWeightPatch
    WeightTransferInitRequest WeightTransferUpdateRequest
"""
METHODS = """
    parse_init_info parse_update_info init_transfer_engine receive_weights receive_sparse_weights
    trainer_send_weights trainer_send_sparse_weights shutdown
"""


@pytest.mark.parametrize("name", NAMES.split())
def test_every_name_is_public(name: str) -> None:
    assert name in wt.__all__
    assert getattr(wt, name).__name__ == name
    assert getattr(wt, name).__doc__


@pytest.mark.parametrize("name", METHODS.split())
def test_every_method_is_there(name: str) -> None:
    for kind in (
        wt.WeightTransferEngine, wt.IPCWeightTransferEngine, wt.NCCLWeightTransferEngine,
    ):  # fmt: skip
        assert callable(getattr(kind, name))


# ---- what a trainer says ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mode", "send_mode"])
def test_both_names_of_the_mode(name: str) -> None:
    args = wt.IPCTrainerSendWeightsArgs(**{name: "http"}, url="http://localhost:8000")
    assert args.mode == args.send_mode == "http"
    assert (args.packed, args.packed_buffer_size_bytes, args.llm_handle) == (False, GIB, None)
    assert wt.IPCTrainerSendWeightsArgs(**asdict(args)) == args


def test_the_order_of_its_fields() -> None:
    handle = object()
    assert wt.IPCTrainerSendWeightsArgs("ray", handle).llm_handle is handle
    assert wt.IPCTrainerSendWeightsArgs("http", None, "http://h").url == "http://h"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mode": "ray"}, "llm_handle is required for 'ray' mode"),
        ({"mode": "http"}, "url is required for 'http' mode"),
        ({"mode": "smoke"}, "mode must be 'ray' or 'http', got smoke"),
        ({}, "mode must be 'ray' or 'http', got None"),
        ({"mode": "ray", "send_mode": "http", "url": "u"}, "mode is 'ray' and send_mode is 'http'"),
        ({"mode": "http", "url": "u", "packed_buffer_size_bytes": 0}, "must be positive, got 0"),
    ],
)
def test_arguments_that_do_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wt.IPCTrainerSendWeightsArgs(**given)
    with pytest.raises(ValueError, match=says):
        wt.IPCWeightTransferEngine.trainer_send_weights(iter(()), given)


# ---- what an update says ------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "more"), KINDS)
@pytest.mark.parametrize("what", ["dtype_names", "shapes"])
def test_lists_of_another_length(kind: Any, more: dict[str, Any], what: str) -> None:
    says = f"`{what}` should be of the same size as `names`: got 0 and 1"
    with pytest.raises(ValueError, match=says):
        kind(**(LISTS | more | {what: []}))


def test_handles() -> None:
    info = wt.IPCWeightTransferUpdateInfo(**LISTS, **HANDLES)
    assert info.ipc_handles == HANDLES["ipc_handles"]
    with pytest.raises(ValueError, match="`ipc_handles` should be of the same size"):
        wt.IPCWeightTransferUpdateInfo(**LISTS, ipc_handles=[])
    with pytest.raises(ValueError, match="Cannot specify both"):
        wt.IPCWeightTransferUpdateInfo(**LISTS, **HANDLES, ipc_handles_pickled="gASV")
    with pytest.raises(ValueError, match="Either `ipc_handles` or `ipc_handles_pickled` must"):
        wt.IPCWeightTransferUpdateInfo(**LISTS)
    buffer = {"GPU-a": (1, 2)}
    packed = wt.IPCWeightTransferUpdateInfo(**LISTS, ipc_handles=buffer, tensor_sizes=[16])
    assert packed.ipc_handles == buffer


def test_pickled_handles_become_data(monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = "gAR9lIwFR1BVLWGUSwFLAoaUcy4="  # {"GPU-a": (1, 2)}
    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    with pytest.raises(ValueError, match="VLLM_ALLOW_INSECURE_SERIALIZATION=1"):
        wt.IPCWeightTransferUpdateInfo(**LISTS, ipc_handles_pickled=pickled)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    info = wt.IPCWeightTransferUpdateInfo(**LISTS, ipc_handles_pickled=pickled)
    assert (info.ipc_handles, info.ipc_handles_pickled) == ({"GPU-a": (1, 2)}, None)
    with pytest.raises(ValueError, match="not handles as vLLM's"):
        wt.IPCWeightTransferUpdateInfo(**LISTS, ipc_handles_pickled="Y29zCg==")


def test_defaults() -> None:
    info = wt.NCCLWeightTransferUpdateInfo(**LISTS)
    assert (info.packed, info.packed_buffer_size_bytes, info.packed_num_buffers) == (False, GIB, 2)
    assert info.update_kind == "dense"
    assert wt.IPCWeightTransferInitInfo().packed is False
    where = wt.NCCLWeightTransferInitInfo("127.0.0.1", 29500, 1, 3)
    assert asdict(where) == {
        "master_address": "127.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 3,
        "nccl_unique_id_b64": None,
        "packed": False, "packed_buffer_size_bytes": GIB, "packed_num_buffers": 2,
    }  # fmt: skip
    assert wt.WeightTransferInitRequest().init_info == {}
    assert wt.WeightTransferUpdateRequest([{}]).update_info == [{}]


@pytest.mark.parametrize(("kind", "more"), KINDS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"update_kind": "diagonal"}, "update_kind must be one of"),
        ({"num_updates_list": [1]}, "for sparse updates only"),
        ({"update_kind": "sparse_flat"}, "is missing"),
        ({"update_kind": "sparse_flat", "num_updates_list": []}, "is empty"),
        ({"update_kind": "sparse_flat", "num_updates_list": [-1]}, "negative"),
        ({"update_kind": "sparse_flat", "num_updates_list": [1, 2]}, "same size as `names`"),
    ],
)
def test_kinds_of_update(
    kind: Any, more: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        kind(**LISTS, **more, **change)
    assert kind(**LISTS, **more, update_kind="sparse_flat", num_updates_list=[0])


# ---- engines ------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.loaded |= {name: t.clone() for name, t in weights}


def test_both_forms_of_the_constructor() -> None:
    config, parallel, model = object(), SimpleNamespace(rank=0), Model()
    whole = SimpleNamespace(parallel_config=parallel)
    factory = wt.IPCWeightTransferEngine(config, whole, torch.device("cpu"), model)
    assert (factory.config, factory.vllm_config, factory.parallel_config) == (
        config, whole, parallel)  # fmt: skip
    assert (factory.device, factory.model) == (torch.device("cpu"), model)
    for older in (
        wt.IPCWeightTransferEngine(config, parallel, model=model),
        wt.IPCWeightTransferEngine(config, parallel, model),
    ):
        assert (older.parallel_config, older.model, older.device) == (parallel, model, None)
    assert wt.IPCWeightTransferEngine(config, parallel).model is None
    assert issubclass(wt.IPCWeightTransferEngine, wt.WeightTransferEngine)
    with pytest.raises(TypeError):
        wt.WeightTransferEngine(config, parallel)  # type: ignore[abstract]


def test_what_cannot_be_parsed() -> None:
    engine = wt.IPCWeightTransferEngine(None, None)
    assert engine.parse_init_info({"packed": True}).packed
    assert engine.parse_update_info(LISTS | HANDLES).names == ["w"]
    with pytest.raises(ValueError, match="Invalid init_info for IPCWeightTransferEngine"):
        engine.parse_init_info({"port": 1})
    with pytest.raises(ValueError, match="Invalid update_info for IPCWeightTransferEngine"):
        engine.parse_update_info({"names": []})
    with pytest.raises(ValueError, match=r"Invalid update_info for .*must be provided"):
        engine.parse_update_info(LISTS)
    with pytest.raises(ValueError, match="give load_weights"):
        engine.receive_weights(engine.parse_update_info(LISTS | HANDLES))
    engine.shutdown()
    engine.shutdown()


# ---- from one to the other ----------------------------------------------------------------

TENSORS = {
    "a": torch.randn(8, 5, dtype=torch.bfloat16), "b": torch.arange(7), "s": torch.tensor(1.5),
    "t": torch.randn(6, 4).t(), "e": torch.zeros(0, 3), "p": torch.nn.Parameter(torch.randn(9)),
}  # fmt: skip


class Receiver:
    """What a server or an actor does with a request: opens it and loads."""

    def __init__(self) -> None:
        self.model, self.requests = Model(), list[dict[str, Any]]()
        self.patches: list[wt.SparseWeightPatch] = []
        self.engine = wt.IPCWeightTransferEngine(None, None, model=self.model)

    def update(self, request: dict[str, Any]) -> None:
        self.requests.append(request)
        info = self.engine.parse_update_info(request["update_info"])
        if info.update_kind == "dense":
            self.engine.receive_weights(info)
        else:
            self.engine.receive_sparse_weights(info, self.keep)

    def keep(self, given: list[wt.SparseWeightPatch]) -> None:
        """Copies: what a patch came in is its trainer's."""
        self.patches += [
            wt.SparseWeightPatch(p.name, p.indices.clone(), p.values.clone(), p.full_shape)
            for p in given
        ]

    def check(self) -> None:
        assert self.model.loaded.keys() == TENSORS.keys()
        for name, want in TENSORS.items():
            got = self.model.loaded[name]
            assert (got.dtype, got.shape) == (want.dtype, want.shape)
            assert torch.equal(got, want)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one call of Ray's that is made; `examples/fsdp_ep_ipc.py` runs on real actors."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda calls: [c() for c in calls]))


def actor(receiver: Receiver) -> Any:
    remote = SimpleNamespace(remote=lambda request: lambda: receiver.update(request))
    return SimpleNamespace(update_weights=remote)


@pytest.mark.usefixtures("ray")
@pytest.mark.parametrize(("packed", "requests"), [(False, 1), (True, 2)])
def test_to_actors(packed: bool, requests: int) -> None:
    receivers = Receiver(), Receiver()
    args = wt.IPCTrainerSendWeightsArgs(
        "ray", [actor(r) for r in receivers], packed=packed, packed_buffer_size_bytes=600
    )
    wt.IPCWeightTransferEngine.trainer_send_weights(iter(TENSORS.items()), args)
    for receiver in receivers:
        receiver.check()
        assert len(receiver.requests) == requests
        json.dumps(receiver.requests)  # plain data


@pytest.mark.usefixtures("ray")
def test_a_tensor_larger_than_the_buffer() -> None:
    args = {"mode": "ray", "llm_handle": actor(Receiver()), "packed": True}
    with pytest.raises(ValueError, match="Tensor 'a' has size 80 bytes, which exceeds"):
        wt.IPCWeightTransferEngine.trainer_send_weights(
            TENSORS.items(), args | {"packed_buffer_size_bytes": 79}
        )


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Receiver, list[str]]]:
    receiver, said = Receiver(), list[str]()
    monkeypatch.setenv("WT_TOKEN", "tok")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said.append(f"{self.path} {self.headers['Authorization']}")
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = 200, {"message": "ok"}
            try:
                receiver.update(body)
            except WeightSyncError as exc:
                status, answer = exc.status, exc.to_dict()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", receiver, said
        server.shutdown()


def test_over_http(url: tuple[str, Receiver, list[str]]) -> None:
    address, receiver, said = url
    args = {"send_mode": "http", "url": address, "packed": True, "packed_buffer_size_bytes": 600}
    wt.IPCWeightTransferEngine.trainer_send_weights(TENSORS.items(), args)
    receiver.check()
    assert said == ["/update_weights Bearer tok"] * 2


def test_a_refusal_is_raised_as_it_was_said(
    url: tuple[str, Receiver, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Any) -> None:
        raise wt.NoUpdate("no update is open", next_step="start one")

    monkeypatch.setattr(url[1], "update", refuse)
    with pytest.raises(wt.NoUpdate, match="no update is open"):
        wt.IPCWeightTransferEngine.trainer_send_weights(
            TENSORS.items(), {"mode": "http", "url": url[0]}
        )


def patches() -> list[wt.SparseWeightPatch]:
    return [
        wt.SparseWeightPatch("a", torch.tensor([7, 2]), torch.ones(2).bfloat16(), (8, 5)),
        wt.SparseWeightPatch("b", torch.tensor([0], dtype=torch.int32), torch.tensor([9]), (7,)),
        wt.SparseWeightPatch("s", torch.zeros(0, dtype=torch.int64), torch.zeros(0), (3, 3)),
    ]


def check_patches(got: list[wt.SparseWeightPatch]) -> None:
    assert [p.name for p in got] == [p.name for p in patches()]
    for have, want in zip(got, patches(), strict=True):
        assert have.full_shape == want.full_shape
        assert have.indices.tolist() == want.indices.tolist()
        assert have.values.dtype == want.values.dtype
        assert torch.equal(have.values, want.values)


@pytest.mark.usefixtures("ray")
def test_patches_to_actors() -> None:
    receivers = Receiver(), Receiver()
    args = {"mode": "ray", "llm_handle": [actor(r) for r in receivers]}
    wt.IPCWeightTransferEngine.trainer_send_sparse_weights(iter(patches()), args)
    for receiver in receivers:
        check_patches(receiver.patches)
        json.dumps(receiver.requests)


def test_patches_over_http(url: tuple[str, Receiver, list[str]]) -> None:
    address, receiver, said = url
    args = wt.IPCTrainerSendWeightsArgs("http", url=address)
    wt.IPCWeightTransferEngine.trainer_send_sparse_weights(patches(), args)
    check_patches(receiver.patches)
    assert said == ["/update_weights Bearer tok"]


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        (wt.SparseWeightPatch("a", torch.tensor([1]), torch.ones(1)), "needs its `full_shape`"),
        (wt.SparseWeightPatch("a", torch.tensor([1, 2]), torch.ones(1), (4,)), "2 indices for 1"),
        (wt.SparseWeightPatch("a", torch.ones(1), torch.ones(1), (4,)), "indices are torch.float"),
        (wt.SparseWeightPatch("a", torch.ones(1, 1).int(), torch.ones(1), (4,)), "one dimension"),
    ],
)
def test_patches_that_cannot_be_sent(patch: wt.SparseWeightPatch, says: str) -> None:
    args = {"mode": "http", "url": "http://127.0.0.1:1"}
    with pytest.raises(wt.RequestError, match=says):
        wt.IPCWeightTransferEngine.trainer_send_sparse_weights([patch], args)
    with pytest.raises(wt.RequestError, match="no patches were given"):
        wt.IPCWeightTransferEngine.trainer_send_sparse_weights([], args)


def test_another_kind_of_update_than_asked_for() -> None:
    engine = wt.IPCWeightTransferEngine(None, None, model=Model())
    dense = engine.parse_update_info(LISTS | HANDLES)
    with pytest.raises(ValueError, match="the update is 'dense': receive_weights takes it"):
        engine.receive_sparse_weights(dense, print)
    sparse = engine.parse_update_info(
        LISTS | HANDLES | {"update_kind": "sparse_flat", "num_updates_list": [1]}
    )
    with pytest.raises(ValueError, match="receive_sparse_weights takes it"):
        engine.receive_weights(sparse)
    with pytest.raises(wt.RequestError, match="plain `storages` and `handles`"):
        engine.receive_sparse_weights(sparse, print)
