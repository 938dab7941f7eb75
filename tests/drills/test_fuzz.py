"""Requests nobody would write, at every route: none is answered with 500, and one that is refused
changes nothing.

schemathesis makes them from what /openapi.json says, both what fits it and what does not;
hypothesis bends requests that would succeed, which gets further in.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from msgspec.structs import replace
from schemathesis import GenerationMode

from tests.drills import figures
from tests.support import fleet, trainer
from tests.support.server import Server
from tests.unit import toys
from tests.unit.test_session import Model
from tests.unit.toy_server import ToyEngine, ToyServer
from vllm_wt_plugin.server.openapi import BODIES
from vllm_wt_plugin.server.routes import ROUTES

Json = trainer.Json
SURE = (200, 400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 501, 503)  # 501, 503: meant so
UPDATE = "/update_weights"


@dataclass
class Target:
    """A server, a trainer whose push makes it what it was, and what was asked and answered."""

    url: str
    push: Callable[[], Json]
    look: Callable[[], tuple[object, ...]]  # all that may not change
    answers: Counter[str] = field(default_factory=Counter)
    flaws: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.restore()

    def restore(self) -> None:
        for path, body in (
            ("/abort_weight_update", {}),
            ("/push_weights", self.push()),
            ("/resume", {}),
        ):
            self.http.post(path, json=body).raise_for_status()
        self.before = self.look()

    def judge(self, what: str, status: int, text: str) -> None:
        """After one request: was it right to answer so?"""
        self.answers[str(status)] += 1
        if status not in SURE:
            self.flaws.append(f"{what}: {status} {text[:500]}")
        if self.look() != self.before:
            if status >= 400:
                self.flaws.append(f"{what}: {status}, yet {self.before} → {self.look()}"[:2000])
            self.restore()

    def figures(self, seed: int) -> dict[str, Any]:
        refused = sum(n for status, n in self.answers.items() if status != "200")
        return {
            "seed": seed, "requests": self.answers.total(), "refused": refused,
            "answers": dict(sorted(self.answers.items())), "flaws": self.flaws,
        }  # fmt: skip


def options(examples: int, seed: int) -> Callable[[Any], Any]:
    """Hypothesis, without what it keeps for the next run: the seed says it all."""
    chosen = settings(
        max_examples=examples, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda test: seeded(seed)(chosen(test))


# ---- from the schema ------------------------------------------------------------------------


def by_schema(target: Target, examples: int, seed: int) -> set[str]:
    """`examples` requests for each route, half of them against its schema. The routes' paths."""

    def ask(case: schemathesis.Case) -> None:
        answer = case.call(timeout=60)
        target.judge(f"{case.method} {case.path} {case.body!r}", answer.status_code, answer.text)

    schema = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
    paths = set()
    for found in schema.include(tag="weight sync").get_all_operations():
        operation = found.ok()
        paths.add(operation.path)
        modes = list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]
        for mode in modes:
            case = operation.as_strategy(generation_mode=mode)
            options(max(1, examples // len(modes)), seed)(given(case=case)(ask))()
    return paths


# ---- nearly right -----------------------------------------------------------------------------

ODD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**40, 2**63 - 1, 2**64, 1e308, -0.5, "", "0", "default", "é\x00",
    "a" * 32, "/wt_" + "b" * 32, "/wt_../../etc/passwd", "bfloat16", "__class__", [], {}, [[]],
    {"kind": "local", "pid": 1, "key": "c" * 32, "nbytes": 8},
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree, less those of long lists' middles."""
    if path:
        yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if not isinstance(key, int) or key < 3 or key == len(node) - 1:
                yield from places(value, (*path, key))


@st.composite
def bent(draw: st.DrawFn, whole: Json) -> Json:
    """`whole` with one to three values replaced, dropped, doubled, or taken from elsewhere."""
    body = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        where = draw(st.sampled_from(list(places(body))))
        node = at(body, where[:-1])
        match draw(st.sampled_from(["odd", "drop", "other", "again"])):
            case "odd":
                node[where[-1]] = copy.deepcopy(draw(st.sampled_from(ODD)))
            case "drop":
                del node[where[-1]]
            case "other":
                node[where[-1]] = copy.deepcopy(at(body, draw(st.sampled_from(list(places(body))))))
            case "again" if isinstance(node, list):
                node.append(copy.deepcopy(node[where[-1]]))
        if not body:
            return body
    return body


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        node = node[key]
    return node


def by_bending(target: Target, bodies: dict[str, Json], examples: int, seed: int) -> None:
    """`examples` requests of each of these that would succeed; what comes within an update gets
    one, which is aborted."""

    def ask(path: str, body: Json) -> None:
        content = json.dumps(body).encode()
        if path == UPDATE:
            target.http.post("/start_weight_update", json={}).raise_for_status()
        answer = target.http.post(
            path, content=content, headers={"Content-Type": "application/json"}
        )
        if path == UPDATE:
            target.http.post("/abort_weight_update", json={}).raise_for_status()
        target.judge(f"{path} {content!r}", answer.status_code, answer.text)

    for path, body in bodies.items():
        options(examples, seed)(given(path=st.just(path), body=bent(body))(ask))()


def right(held: trainer.Trainer, patched: str) -> dict[str, Json]:
    """Requests that succeed; the tensors are `held`'s."""
    base = {"base_version": "before", "version": "after", "registration": "d" * 32}
    part, patch = held.part(), held.patch(patched)["update_info"]
    row = {k: patch[k] for k in ("names", "dtype_names", "shapes", "num_updates_list")}
    register = {"id": "d" * 32, "storages": patch["storages"], "tensors": [
        [f"{kind} {patched}", dtype, [n], *handle[:2]]
        for kind, dtype, n, handle in zip(
            ("indices", "values"), ("int64", patch["dtype_names"][0]),
            patch["num_updates_list"] * 2, patch["handles"], strict=True)
    ]}  # fmt: skip
    return {
        "/push_weights": held.push("after"),
        UPDATE: part,
        "/push_patches": base | row | {"register": register, "form": "tensors"},
        "/start_weight_update": {"owner": "me", "lease_s": 30.0, "announced": "e" * 32},
        "/weight_checksums": {"names": held.names},
        "/init_weight_transfer_engine": {"init_info": {"packed": False, "protocol": 1}},
        "/bridge/notify_update": {"update_count": 3, "trainer_rank": 0, "version": "after"},
        "/finish_weight_update": {"weight_version": "after", "session": "f" * 32},
    }


# ---- the drill --------------------------------------------------------------------------------

FORMS = ["short", pytest.param("long", marks=pytest.mark.drill)]
EXAMPLES = {"short": 8, "long": 100}


@contextmanager
def toy() -> Iterator[tuple[Target, trainer.Trainer]]:
    tensors = toys.checkpoint(Model(), 1)
    engine = ToyEngine(ranks=2)
    with ToyServer(engine) as server, trainer.Trainer(tensors) as held:

        def look() -> tuple[object, ...]:
            states = [replace(w.session.state(), lease_left_s=0.0) for w in engine.workers]
            return *states, engine.paused, engine.version, engine.weights()

        yield Target(server.url, lambda: held.push("before"), look), held


@pytest.mark.parametrize("form", FORMS)
def test_routes_in_front_of_toy_workers(form: str) -> None:
    seed = figures.seed()
    with toy() as (target, held):
        paths = by_schema(target, EXAMPLES[form], seed)
        patched = max(held.tensors, key=lambda n: held.tensors[n].numel())
        by_bending(target, right(held, patched), EXAMPLES[form] * 2, seed)
    figures.keep("fuzz", form, target.figures(seed))
    assert not target.flaws
    assert paths == {path for _, path in ROUTES}
    assert target.answers["200"] > 0


@pytest.mark.server
@pytest.mark.parametrize("form", FORMS)
def test_a_real_server(
    serve: Callable[..., Server], checkpoint: Callable[..., Path], form: str
) -> None:
    server = fleet.plain(serve, checkpoint)
    held, seed = trainer.trainer(1), figures.seed()

    def look() -> tuple[object, ...]:
        status = server.status()
        sums = server.http.post("/weight_checksums", json={}).json()["ranks"]
        told = [status[k] for k in ("state", "version", "reason", "owner", "asleep")]
        return *told, fleet.paused(server), sums

    target = Target(server.url, lambda: held.push("before"), look)
    by_schema(target, EXAMPLES[form] // 8, seed)
    by_bending(target, right(held, "model.norm.weight"), EXAMPLES[form] // 4, seed)
    figures.keep("fuzz-vllm", form, target.figures(seed))
    assert not target.flaws
    fleet.push(server, 1, "after the fuzzer")
    fleet.assert_serves(server, 1, "after the fuzzer")


def test_every_body_is_the_struct_that_its_schema_tells_of() -> None:
    """The table of bodies and the handlers' decoders say the same."""
    with toy() as (target, _):
        for path, kind in BODIES.items():
            answer = target.http.post(path, json={"no such field": 1})
            assert answer.status_code == 400, path
            assert "unknown field" in answer.json()["error"], path
            for name in kind.__struct_fields__:
                answer = target.http.post(path, json={name: {"no": "value"}})
                assert "unknown field `no such field`" not in answer.text
