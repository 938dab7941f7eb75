"""What a real server says to bad requests, and that it goes on serving the old weights."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.support import fleet
from tests.support.fleet import refused
from tests.support.server import Server
from tests.support.shared import mapped
from tests.support.trainer import BUFFER, Json, Trainer, trainer, weights
from vllm_wt_plugin import HandleError, WeightSync
from vllm_wt_plugin.transport import shm

pytestmark = pytest.mark.server

Q = "model.layers.0.self_attn.q_proj.weight"  # (128, 64)
NORM = "model.norm.weight"
HUGE = 2**40
BF16 = torch.bfloat16


@pytest.fixture
def server(serve: Callable[..., Server], checkpoint: Callable[..., Path]) -> Iterator[Server]:
    """Serves seed 1; whatever the test sends, it must serve the same afterwards."""
    server = fleet.plain(serve, checkpoint)
    with fleet.serving_on(server, 1):
        yield server
    fleet.assert_no_secrets(server)


# ---- tensors that do not fit the model ----------------------------------------------------

PLAN = (422, "PlanError")
WRONG_TENSORS = {
    "unknown name": (
        {"model.layers.0.mlp.banana.weight": torch.zeros(4, 4, dtype=BF16)},
        "does not take model.layers.0.mlp.banana.weight with shape (4, 4) and dtype bfloat16",
    ),
    "unknown layer": (
        {"model.layers.9.mlp.up_proj.weight": torch.zeros(128, 64, dtype=BF16)},
        "does not take model.layers.9.mlp.up_proj.weight",
    ),
    "missing part": (
        {Q: None},
        "model.layers.0.self_attn.qkv_proj.weight (8192 of 16384 elements)",
    ),
    "missing name": ({NORM: None}, "1 live parameters that no name covers: model.norm.weight"),
    "smaller": ({Q: torch.zeros(127, 64, dtype=BF16)}, f"does not take {Q} with shape (127, 64)"),
    "larger": ({Q: torch.zeros(129, 64, dtype=BF16)}, f"larger than what the served model takes"
               f" of them: {Q} (129, 64)"),
    "twice as large": ({Q: torch.zeros(256, 64, dtype=BF16)}, f"{Q} (256, 64)"),
    "transposed": ({Q: weights(1)[Q].T}, f"does not take {Q} with shape (64, 128)"),
    "flat": ({Q: weights(1)[Q].flatten()}, f"does not take {Q} with shape (8192,)"),
    "no elements": ({Q: torch.zeros(0, 64, dtype=BF16)}, f"does not take {Q} with shape (0, 64)"),
    "one element": ({NORM: torch.ones(1, dtype=BF16)}, f"does not take {NORM} with shape (1,)"),
    "int8": ({Q: torch.zeros(128, 64, dtype=torch.int8)}, f"{Q}: int8 cannot become bfloat16"),
    "float8": (
        {Q: torch.zeros(128, 64, dtype=torch.float8_e4m3fn)},
        f"{Q}: float8_e4m3fn cannot become bfloat16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_tensors_that_do_not_fit(server: Server, what: str) -> None:
    changes, text = WRONG_TENSORS[what]
    tensors = {n: t for n, t in {**weights(2), **changes}.items() if t is not None}
    with Trainer(tensors) as other:
        response = server.http.post("/push_weights", json=other.push())
    refused(response, *PLAN, text, "served model" if "miss" not in what else "in one update")


# ---- requests that are malformed ----------------------------------------------------------


def at(*path: Any) -> Callable[[Json, Any], None]:
    """A setter of the value at `path`; a place past a list's end is appended."""

    def put(body: Json, value: Any) -> None:
        node: Any = body
        for key in path[:-1]:
            node = node[key]
        if isinstance(node, list) and path[-1] == len(node):
            node.append(value)
        else:
            node[path[-1]] = value

    return put


TENSOR, STORAGE = ("register", "tensors", 1), ("register", "storages", 0)
V = "model.layers.0.self_attn.q_proj.weight"
BENT: dict[str, tuple[Callable[[Json, Any], None], Any, str, tuple[str, ...]]] = {
    "extra field": (at("extra"), 1, "RequestError", ("unknown field `extra`",)),
    "extra field inside": (
        at(*STORAGE, "extra"), 1, "RequestError", ("`extra`", "$.register.storages[0]")),
    "extra item": (at(*TENSOR, 6), 1, "RequestError", ("at most length 6",)),
    "negative size": (
        at(*TENSOR, 2), [-1, 64], "RequestError", (">= 0", "$.register.tensors[1][2][0]")),
    "size over 2^40": (
        at(*TENSOR, 2), [HUGE + 1], "RequestError",
        (f"<= {HUGE}", "$.register.tensors[1][2][0]")),
    "elements over 2^40": (
        at(*TENSOR, 2), [HUGE, 64], "RequestError", ("more than 2^40 elements", V)),
    "size over 2^64": (at(*TENSOR, 2), [2**70], "RequestError", (f"<= {HUGE}",)),
    "more than the storage": (
        at(*TENSOR, 2), [HUGE // 2], "HandleError",
        (f"the view needs {HUGE} bytes, its storage has 16384", V)),
    "negative offset": (at(*TENSOR, 4), -4, "RequestError", (">= 0", "$.register.tensors[1][4]")),
    "offset past the end": (
        at(*TENSOR, 4), 1, "HandleError", ("the view needs 16386 bytes, its storage has 16384",)),
    "negative stride": (at(*TENSOR, 5), [-1, 1], "RequestError", (">= 0",)),
    "huge stride": (at(*TENSOR, 5), [HUGE, HUGE], "HandleError", ("its storage has 16384", V)),
    "short stride": (at(*TENSOR, 5), [1], "HandleError", ("stride (1,) does not fit", V)),
    "no such storage": (
        at(*TENSOR, 3), 999, "HandleError", ("storage 999 of 25 does not exist", V)),
    "storage number below 0": (at(*TENSOR, 3), -1, "RequestError", (">= 0",)),
    "segment smaller than claimed": (
        at(*STORAGE, "nbytes"), 2**47, "HandleError",
        ("has 36864 bytes, its handle claims 140737488355328", "embed_tokens", "rank 0")),
    "segment larger than any": (
        at(*STORAGE, "nbytes"), 2**60, "RequestError", ("$.register.storages[0].nbytes",)),
    "segment of negative size": (at(*STORAGE, "nbytes"), -1, "RequestError", (">= 0",)),
    "another's shared memory": (
        at(*STORAGE, "name"), "/psm_4a3b2c1d", "RequestError",
        ("matching regex '^/wt_[0-9a-f]{32}", "$.register.storages[0].name")),
    "path out of /dev/shm": (
        at(*STORAGE, "name"), "/wt_../../etc/passwd", "RequestError", ("matching regex",)),
    "newline after the name": (
        at(*STORAGE, "name"), f"/wt_{'a' * 32}\n", "RequestError", ("matching regex",)),
    "memory that is not there": (
        at(*STORAGE, "name"), f"/wt_{'a' * 32}", "HandleError",
        ("is gone", "embed_tokens", "register the tensors again")),
    "memory of another kind": (
        at(*STORAGE), {"kind": "local", "pid": 1, "key": "a" * 32, "nbytes": 36864},
        "HandleError", ("the memory is in process 1",)),
    "a kind unknown": (at(*STORAGE, "kind"), "file", "RequestError", ("'file'", ".kind")),
    "empty list": (
        at("register", "tensors"), [], "RequestError", ("length >= 1", "$.register.tensors")),
    "empty name": (at(*TENSOR, 0), "", "RequestError", ("length >= 1",)),
    "unknown dtype": (
        at(*TENSOR, 1), "complex64", "RequestError",
        ("dtype 'complex64' cannot be transferred", V, "use one of bool")),
    "an attribute for a dtype": (
        at(*TENSOR, 1), "__class__", "RequestError", ("'__class__' cannot be transferred",)),
    "id that is none": (at("registration"), "../x", "RequestError", ("$.registration",)),
    "empty version": (at("version"), "", "RequestError", ("length >= 1", "$.version")),
    "a number for a version": (at("version"), 5, "RequestError", ("got `int`", "$.version")),
}  # fmt: skip


@pytest.mark.parametrize("what", BENT)
def test_bent_requests(server: Server, what: str) -> None:
    put, value, code, texts = BENT[what]
    body = trainer(2).push()
    put(body, value)
    refused(server.http.post("/push_weights", json=body), 400, code, *texts)


def test_names_given_twice(server: Server) -> None:
    body = trainer(2).push()
    body["register"]["tensors"].append(body["register"]["tensors"][0])
    refused(
        server.http.post("/push_weights", json=body), 400, "RequestError",
        "the same name is given twice", "model.embed_tokens.weight",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("path", "field"), [("/push_weights", b"registration"), ("/update_weights", b"update_info")]
)
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b'{"FIELD": "0123', "the body is not valid JSON: Input data was truncated"),
        (b"", "the body is not valid JSON"),
        (b'{"\xff\xfe": "0123"}', "the body is not valid JSON"),
        (b"[" * 100_000, "Expected `object`, got `array`"),
        (b"null", "Expected `object`, got `null`"),
        (b"{}", "missing required field `FIELD`"),
    ],
)
def test_broken_json(server: Server, path: str, field: bytes, content: bytes, text: str) -> None:
    response = server.http.post(
        path,
        content=content.replace(b"FIELD", field),
        headers={"Content-Type": "application/json"},
    )
    refused(response, 400, "RequestError", text.replace("FIELD", field.decode()))


def test_registration_that_the_server_does_not_hold(server: Server) -> None:
    body = trainer(2).push() | {"register": None}
    refused(
        server.http.post("/push_weights", json=body), 409, "UnknownRegistration",
        "the worker does not hold these handles", "send the registration again",
    )  # fmt: skip
    body = trainer(2).push() | {"registration": "0" * 32}  # not the id inside
    response = server.http.post("/push_weights", json=body)
    refused(response, 409, "UnknownRegistration", "does not hold")


def test_registration_id_used_for_other_tensors(server: Server) -> None:
    """Taking the tensors it knows under this id would serve old weights as new ones."""
    known, other = trainer(1).push("before"), trainer(2).push()
    assert server.http.post("/push_weights", json=known).status_code == 200
    other["registration"] = other["register"]["id"] = known["registration"]
    response = server.http.post("/push_weights", json=other)
    refused(response, 400, "HandleError", "this registration id is in use for other tensors")


# ---- memory that goes away ----------------------------------------------------------------


def test_memory_that_its_trainer_released(server: Server) -> None:
    """Held by the worker from an earlier push, and gone since."""
    with Trainer(weights(1)) as gone:
        body = gone.push("before")
        assert server.http.post("/push_weights", json=body).status_code == 200
    again = body | {"register": None}
    refused(
        server.http.post("/push_weights", json=again), 400, "HandleError",
        "the shared-memory segment of this parameter is gone", "register the tensors again",
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_weight_sync_recovers_from_a_swept_dev_shm(server: Server, packed: bool) -> None:
    """Someone emptied /dev/shm under a living trainer: one push fails, the next one works."""
    with WeightSync(server.url, packed=packed, buffer_bytes=BUFFER) as sync:
        before = mapped()
        sync.push(weights(1), version="before")
        for name in mapped() - before:
            Path(shm.SHM_DIR, name).unlink()
        with pytest.raises(HandleError, match="is gone"):
            sync.push(weights(1), version="refused")
        assert server.status()["version"] == "before"
        assert sync.push(weights(1), version="before").ok


# ---- the update of several calls ----------------------------------------------------------


def test_parts_and_ends_without_a_start(server: Server) -> None:
    for path, body in (
        ("/update_weights", trainer(2).part()),
        ("/finish_weight_update", {"weight_version": "new"}),
    ):
        response = server.http.post(path, json=body)
        refused(response, 409, "NoUpdate", "no such update is open", "start the update again")


def test_start_twice_names_the_owner_and_the_time(server: Server) -> None:
    begun = time.time()
    first = {"owner": "trainer A on host 7", "lease_s": 60}
    assert server.http.post("/start_weight_update", json=first).status_code == 200
    try:
        for path, body in (
            ("/start_weight_update", {"owner": "trainer B"}),
            ("/push_weights", trainer(2).push()),
            ("/update_weight_version", {"new_version": "sneaked in"}),
            ("/shutdown_weight_transfer_engine", {}),
        ):
            response = server.http.post(path, json=body)
            refused(
                response, 409, "UpdateInProgress", "an update of trainer A on host 7 is open since",
                "POST /abort_weight_update",
            )  # fmt: skip
            found = re.search(r"since (\d\d:\d\d:\d\d) UTC", response.text)
            assert found
            near = {time.strftime("%H:%M:%S", time.gmtime(begun + d)) for d in range(-1, 4)}
            assert found[1] in near
        status = server.status()
        assert (status["state"], status["owner"]) == ("UPDATING", "trainer A on host 7")
        assert begun - 1 <= status["since"] <= time.time()
        assert 0 < status["lease_left_s"] <= 60
    finally:
        server.http.post("/abort_weight_update", json={})


BAD_PARTS: dict[str, tuple[Callable[[Json], Any], int, tuple[str, ...]]] = {
    "given twice": (
        lambda u: [u[k].append(u[k][0]) for k in ("names", "dtype_names", "shapes", "handles")],
        400, ("the same name is given twice", "model.embed_tokens.weight")),
    "unequal lists": (
        lambda u: u["shapes"].pop(),
        400, ("`shapes` should be of the same size as `names`: got 24 and 25",)),
    "empty": (
        lambda u: [u[k].clear() for k in ("names", "dtype_names", "shapes", "handles")],
        400, ("`names` is empty",)),
    "absurd size": (
        lambda u: at("shapes", 1)(u, [HUGE, HUGE]), 400, ("more than 2^40 elements",)),
    "an attribute for a dtype": (
        lambda u: at("dtype_names", 1)(u, "__class__"), 400, ("cannot be transferred",)),
    "no such storage": (
        lambda u: at("handles", 1, 0)(u, 999), 400, ("storage 999 of 25 does not exist",)),
    "unknown name": (lambda u: at("names", 1)(u, "banana"), 422, ("does not take banana",)),
    "memory that is not there": (
        lambda u: at("storages", 0, "name")(u, f"/wt_{'a' * 32}"), 400, ("is gone",)),
    "a patch": (lambda u: at("update_kind")(u, "sparse_flat"), 400, ("num_updates_list",)),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_PARTS)
def test_bad_parts(server: Server, what: str) -> None:
    """Nothing was written yet: ending the update leaves the old weights serving."""
    bend, status, texts = BAD_PARTS[what]
    body = trainer(2).part()
    bend(body["update_info"])
    assert server.http.post("/start_weight_update", json={}).status_code == 200
    response = server.http.post("/update_weights", json=body)
    server.http.post("/abort_weight_update", json={})
    assert response.status_code == status, response.text
    for text in texts:
        assert text in response.text


@pytest.mark.parametrize(
    ("lease", "text"), [(0, "> 0"), (-1, "> 0"), (1e9, "<= 3600"), ("60", "got `str`")]
)
def test_bad_leases(server: Server, lease: object, text: str) -> None:
    response = server.http.post("/start_weight_update", json={"lease_s": lease})
    refused(response, 400, "RequestError", text, "$.lease_s")


# ---- who may ask (in full in tests/unit/test_access.py) -----------------------------------


@pytest.mark.parametrize(
    ("headers", "status", "text"),
    [
        ({"Host": "evil.example"}, 403, "the URL must name this machine"),
        ({"Origin": "http://evil.example"}, 403, "browsers may not reach the weight routes"),
        ({"Content-Type": "text/plain"}, 415, "the weight routes take JSON only"),
        ({"X-Forwarded-For": "127.0.0.1"}, 403, "only this machine"),
    ],
)
def test_strangers_without_a_token(
    server: Server, headers: dict[str, str], status: int, text: str
) -> None:
    for path in ("/push_weights", "/start_weight_update", "/pause"):
        body = httpx.Request("POST", server.url, json=trainer(2).push())
        given = {"Content-Type": "application/json"} | headers
        response = server.http.post(path, content=body.content, headers=given)
        refused(response, status, "AccessDenied", text)


@pytest.mark.parametrize("given", [None, "Bearer wrong", f"Basic {fleet.TOKEN}", "Bearer"])
def test_wrong_token(
    serve: Callable[..., Server], checkpoint: Callable[..., Path], given: str | None
) -> None:
    guarded = fleet.guarded(serve, checkpoint)
    with fleet.serving_on(guarded, 2), httpx.Client(base_url=guarded.url, trust_env=False) as http:
        headers = {} if given is None else {"Authorization": given}
        for method, path in (("POST", "/push_weights"), ("GET", "/weight_transfer_status")):
            body = trainer(1).push() if method == "POST" else None
            response = http.request(method, path, json=body, headers=headers)
            refused(response, 401, "AccessDenied", "token", "WT_TOKEN")
            assert response.headers["www-authenticate"] == "Bearer"
    fleet.assert_no_secrets(guarded)
