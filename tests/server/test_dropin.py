"""Code written for vLLM's own weight transfer, unchanged, against this plugin.

On a CPU that is everything but CUDA handles and NCCL itself: vLLM's HTTP client class, the methods
of an `LLM`, its nccl trainer classes with gloo in the place of their communicator, refusals. vLLM's
IPC trainer class asks CUDA for its device in its constructor, so it cannot be made here;
`tests/gpu/test_dropin.py` runs it, and `tests/gpu/test_nccl.py` the others on NCCL.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from tests.support import fleet, models
from tests.support.fleet import TOKEN, push
from tests.support.offline import Offline, differences
from tests.support.ports import free_port
from tests.support.server import Server
from tests.support.trainer import trainer, weights
from tests.support.waiting import until
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.transport import pynccl

pytestmark = pytest.mark.server
PICKLED = {"update_info": {"names": ["w"], "dtype_names": ["bfloat16"], "shapes": [[1]],
                           "ipc_handles_pickled": "gARdlC4="}}  # fmt: skip


@pytest.fixture
def server(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Server:
    return fleet.plain(serve, checkpoint)


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.netrc(tmp_path, TOKEN, monkeypatch)


@pytest.fixture(scope="module")
def by_group(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Under the name that vLLM's sparse trainer asks for; it takes dense broadcasts too."""
    log = tmp_path_factory.mktemp("by-group") / "server.log"
    some = ("--additional-config", '{"wt": {"partial": true}}')
    with Server(checkpoint("qwen3", 1), log, args=some, backend="sparse_nccl") as server:
        yield server


def client(server: Server) -> Any:
    from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient

    return HTTPVLLMWeightSyncClient(server.url, timeout=60)


def update(vllm: Any, seed: int, version: str, *, each_rank: bool = False) -> None:
    """A whole update in two parts, as a trainer class drives its client."""
    vllm.init_weight_transfer_engine({"packed": False})
    vllm.start_weight_update()
    names = trainer(seed).names
    for half in (names[:11], names[11:]):
        info = trainer(seed).part(half)["update_info"]
        vllm.update_weights([info] if each_rank else info)
    vllm.finish_weight_update(version)


def test_vllms_http_client_on_loopback(server: Server) -> None:
    vllm = client(server)
    push(server, 3, "pushed")
    want = server.generations()
    push(server, 1, "old")
    for each_rank in (False, True):
        update(vllm, 3, "v3", each_rank=each_rank)
        until(lambda: not fleet.paused(server), 5)
        assert server.generations() == want
        assert server.http.get("/weight_info").json() == {"weight_version": "v3"}
        update(vllm, 1, "back")
        fleet.assert_serves(server, 1, "back")
    if hasattr(vllm, "shutdown_weight_transfer_engine"):  # vLLM >= 0.32
        vllm.shutdown_weight_transfer_engine()
    else:
        server.http.post("/shutdown_weight_transfer_engine", json={}).raise_for_status()
    assert server.status()["registrations"] == []


def test_its_pickles_need_a_token(server: Server) -> None:
    with fleet.serving_on(server, 1):
        client(server).start_weight_update()
        with pytest.raises(requests.HTTPError, match="403"):
            client(server).update_weights(PICKLED["update_info"])
        response = server.http.post("/update_weights", json=PICKLED)
        fleet.refused(response, 403, "AccessDenied", "pickled handles need a token", ".netrc")
        server.http.post("/abort_weight_update", json={})


@pytest.mark.usefixtures("netrc")
def test_a_token_from_netrc(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> None:
    """Its pickles then come as far as a worker without a GPU can take them."""
    guarded = fleet.guarded(serve, checkpoint)
    update(client(guarded), 2, "with a token")
    fleet.assert_serves(guarded, 2, "with a token")
    client(guarded).start_weight_update()
    with pytest.raises(requests.HTTPError, match="400"):
        client(guarded).update_weights(PICKLED["update_info"])
    response = guarded.http.post("/update_weights", json=PICKLED)
    fleet.refused(response, 400, "RequestError", "refusing `ipc_handles_pickled` without")
    guarded.http.post("/abort_weight_update", json={})
    fleet.assert_serves(guarded, 2, "with a token")


class Gloo:
    """vLLM's communicator as its trainer classes use it, on gloo: theirs needs GPUs."""

    device = torch.device("cpu")

    def __init__(self, info: Any) -> None:
        self.group = pynccl.open_group(
            info.master_address, info.master_port, info.world_size, timeout_s=30
        )

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        assert src == 0
        if tensor.numel():
            data = tensor.contiguous().view(-1).view(torch.uint8)
            assert until(self.group.broadcast(data, 30).done, 30)

    def destroy(self) -> None:
        self.group.close()


@pytest.fixture
def gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two things of vLLM's nccl trainers that a machine without GPUs lacks."""
    for name in ("nccl_engine", "sparse_nccl_engine"):
        module = importlib.import_module(f"vllm.distributed.weight_transfer.{name}")
        monkeypatch.setattr(module, "open_trainer_endpoint", Gloo)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)


class Bare:
    """The same calls as SkyRL's client makes them: no body where there is nothing to say, a new
    connection for each."""

    def __init__(self, server: Server) -> None:
        self._url = server.url

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._post("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._post("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("finish_weight_update", weight_version and {"weight_version": weight_version})

    def _post(self, path: str, body: Any = None) -> None:
        headers = {"Connection": "close"}
        requests.post(f"{self._url}/{path}", json=body, headers=headers).raise_for_status()


def nccl_trainer(
    kind: str, server: Server, source: Any = None, calls: Any = None, **more: Any
) -> Any:
    """vLLM's trainer class for a backend, by its factory; `calls`: another client than vLLM's."""
    from vllm.distributed.weight_transfer import factory, nccl_engine, sparse_nccl_engine

    info = {
        "nccl": nccl_engine.NCCLTrainerInitInfo,
        "sparse_nccl": sparse_nccl_engine.SparseNCCLTrainerInitInfo,
    }[kind](rank=0, master_address="127.0.0.1", master_port=free_port(), world_size=2, **more)
    return factory.WeightTransferTrainerFactory.trainer_init(
        info, client=calls or client(server), source=source
    )


def serves(server: Server, want: dict[str, torch.Tensor]) -> bool:
    """Every weight, by checksum; nothing is open, nothing paused."""
    with WeightSync(server.url) as sync:
        assert sync.verify(want).ok
    return server.status()["state"] == "IDLE" and not fleet.paused(server)


@pytest.mark.usefixtures("gloo")
def test_vllms_nccl_trainer(by_group: Server) -> None:
    """Tensor by tensor; its packed stream needs CUDA streams (`tests/unit/test_nccl.py` has its
    buckets)."""
    from vllm.distributed.weight_transfer.base import ModuleSource

    for seed, calls in ((3, None), (1, Bare(by_group))):
        source = ModuleSource(models.build("qwen3", seed))
        engine = nccl_trainer("nccl", by_group, source, calls, packed=False)
        for _ in range(2):
            engine.send_weights()
            assert serves(by_group, weights(seed))
        engine.shutdown()


@pytest.mark.usefixtures("gloo")
def test_each_parameter_in_an_update_of_its_own(by_group: Server) -> None:
    """As TRL's online DPO sends them. What this vLLM computes from several comes together: alone
    it is refused, and the old weights serve on."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Some(WeightSource):
        now: tuple[str, ...] = ()

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(n, want[n].dtype, tuple(want[n].shape)) for n in self.now]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return ((n, want[n]) for n in self.now)

    push(by_group, 1, "old")
    want, source = weights(2), Some()
    refused: dict[str, requests.Response] = {}
    source.now = tuple(want)[:1]
    engine = nccl_trainer("nccl", by_group, source, packed=False)
    for name in want:
        source.now = (name,)
        try:
            engine.send_weights()
        except requests.HTTPError as exc:
            refused[name] = exc.response
        assert by_group.status()["state"] == "IDLE"
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert {n.split(".")[-2] for n in refused} == set(fused)
    for answer in refused.values():
        assert answer.status_code == 422
        assert "makes one tensor of these and others" in answer.text
    source.now = tuple(refused)
    engine.send_weights()
    assert serves(by_group, want)
    engine.shutdown()


@pytest.mark.usefixtures("gloo")
def test_vllms_sparse_trainer(by_group: Server) -> None:
    """Its one call, its chunks, and a patch that cannot be: the trainer hears why, and the old
    weights serve on."""
    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch

    push(by_group, 1, "old")
    want = dict(weights(1))

    def patch(name: str, step: int, by: float) -> Any:
        flat = want[name].reshape(-1).clone()
        indices = torch.arange(0, flat.numel(), step, dtype=torch.int32).flip(0)
        flat[indices.long()] += by
        want[name] = flat.view(want[name].shape)
        return SparseWeightPatch(name, indices, flat[indices.long()], tuple(want[name].shape))

    norms = [n for n in want if n.endswith("norm.weight")]
    engine = nccl_trainer("sparse_nccl", by_group)
    engine.send_weights([])
    engine.send_weights([patch(n, 2, 1.0) for n in norms])
    assert serves(by_group, want)
    engine.client.start_weight_update()
    for half in (norms[:3], norms[3:]):
        engine.send_weight_chunk([patch(n, 3, 0.5) for n in half])
    engine.client.finish_weight_update("chunks")
    assert serves(by_group, want)
    assert by_group.status()["version"] == "chunks"
    before = dict(want)
    wrong = patch(norms[0], 2, 1.0)
    wrong.indices[0] = wrong.indices[1]
    with pytest.raises(requests.HTTPError, match="400"):
        engine.send_weights([wrong])
    assert serves(by_group, before)
    engine.shutdown()


def test_refusals(server: Server) -> None:
    with fleet.serving_on(server, 1):
        response = server.http.post("/start_draft_weight_update")
        fleet.refused(response, 501, "UnsupportedVLLM", "draft model", "upstream_ipc")
        server.http.post("/start_weight_update").raise_for_status()
        two = [trainer(3).part()["update_info"]] * 2
        response = server.http.post("/update_weights", json={"update_info": two})
        fleet.refused(response, 400, "RequestError", "a list of 2, there are 1 workers")
        server.http.post("/abort_weight_update", json={})


def test_our_routes_win_over_those_of_dev_mode(
    serve: Callable[..., Server], checkpoint: Callable[..., Path]
) -> None:
    """Whether or not this vLLM takes its own out of the way."""
    guarded = fleet.guarded(serve, checkpoint)
    response = guarded.http.post("/update_weights", json={})
    assert response.status_code == 400
    assert response.json()["code"] == "RequestError"
    spec = guarded.http.get("/openapi.json").json()["paths"]
    assert "abort_weight_update" in "".join(spec)
    assert guarded.http.post("/abort_requests", json={}).status_code == 200  # vLLM's stay


def test_weight_checker_in_dev_mode(
    serve: Callable[..., Server], checkpoint: Callable[..., Path]
) -> None:
    """vLLM's own route, over what we have written."""
    guarded = fleet.guarded(serve, checkpoint)

    def checked(**body: Any) -> dict[str, Any]:
        response = guarded.http.post("/weight_checker", json=body)
        if response.status_code == 404 and fleet.vllm_version() < (0, 32):
            pytest.skip("vLLM has this route from 0.32 on")
        assert response.status_code == 200, response.text
        data: dict[str, Any] = response.json()
        return data

    sums = {}
    for seed in (3, 2):
        push(guarded, seed, "pushed")
        sums[seed] = checked(action="checksum")["checksums"]
    assert checked(action="compare", baseline=sums[2]) == {"match": True, "mismatches": []}
    assert not checked(action="compare", baseline=sums[3])["match"]


def test_the_methods_of_an_llm(
    offline: Callable[..., Offline], checkpoint: Callable[..., Path]
) -> None:
    """`LLM.init_weight_transfer_engine`, `start_weight_update`, … with its workers elsewhere."""
    a, b = (checkpoint("llama_bias", seed) for seed in (21, 22))
    live, reference = offline("live", in_process=False), offline("reference")
    said = live.lifecycle(a, b)
    assert differences(said["before"], reference.fresh(a)) == []
    assert differences(said["after"], reference.fresh(b)) == []
    assert said["version"] == said["workers"] == "v2"
    assert "draft model" in said["draft"]
    assert "no update is open" in said["too early"]
    assert "names" in said["nonsense"]
    assert said["after nonsense"] == "IDLE"
    assert differences(said["still"], reference.fresh(a)) == []
