"""What Prometheus sees: after what happens to real routes in front of toy workers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from tests.unit.test_session import Trainer
from tests.unit.toy_server import ToyEngine, ToyServer
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.errors import TransferError, WeightSyncError
from vllm_wt_plugin.server.metrics import STATES
from vllm_wt_plugin.wire import messages as msg

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "weight_sync.json"


class Seen:
    """One scrape of /metrics, less what an earlier one showed."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.before = self.samples()

    def samples(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = httpx.get(f"{self.url}/metrics/", trust_env=False).text
        return {
            (s.name, tuple(sorted(s.labels.items()))): s.value
            for family in text_string_to_metric_families(text)
            for s in family.samples
        }

    def more(self, name: str, **labels: str) -> float:
        key = (f"vllm_wt_{name}", tuple(sorted(labels.items())))
        return self.samples().get(key, 0.0) - self.before.get(key, 0.0)

    def now(self, name: str, **labels: str) -> float | None:
        return self.samples().get((f"vllm_wt_{name}", tuple(sorted(labels.items()))))

    def state(self) -> list[str]:
        return [s for s in STATES if self.now("state", state=s) == 1]


@pytest.fixture
def server() -> Iterator[ToyServer]:
    with ToyServer(ToyEngine()) as running:
        running.engine.workers[0].session.known.keeps_shadow = True
        yield running


def test_pushes(server: ToyServer) -> None:
    seen = Seen(server.url)
    tensors = Trainer(2).tensors
    nbytes = sum(t.nbytes for t in tensors.values())
    with WeightSync(server.url) as sync:
        sync.push(tensors, "first", mode="sparse")
        assert seen.more("pushes_total", kind="dense") == 1
        assert seen.more("bytes_total", kind="dense") == nbytes
        assert seen.now("version_info", version="first") == 1
        changed = next(t for t in tensors.values() if t.numel() > 8)
        changed.view(-1)[:5] += 1
        sync.push(tensors, "second", mode="sparse")
    assert seen.more("pushes_total", kind="sparse") == 1
    assert seen.more("changed_elements_total") == 5
    assert 0 < seen.more("bytes_total", kind="sparse") < nbytes / 2
    assert seen.more("density_count") == 1
    assert seen.more("phase_seconds_count", phase="total") == 2
    assert seen.more("phase_seconds_count", phase="copy") == 2
    assert seen.now("version_info", version="second") == 1
    assert seen.now("version_info", version="first") is None
    assert seen.state() == ["IDLE"]
    last = httpx.get(f"{server.url}/weight_transfer_status").json()["last_push"]
    total = sum(t.numel() for t in tensors.values())
    assert (last["kind"], last["version"], last["changed"]) == ("sparse", "second", 5 / total)


def test_a_packed_push_and_one_in_parts(server: ToyServer) -> None:
    seen = Seen(server.url)
    tensors = Trainer(3).tensors
    with WeightSync(server.url, packed=True, buffer_bytes=1 << 12) as sync:
        sync.push(tensors)
    assert seen.more("pushes_total", kind="dense") == 1
    assert seen.more("bytes_total", kind="dense") == sum(t.nbytes for t in tensors.values())
    assert seen.state() == ["IDLE"]


def test_failures_by_cause(server: ToyServer) -> None:
    seen = Seen(server.url)
    with WeightSync(server.url) as sync, pytest.raises(WeightSyncError):
        sync.push({"no.such.weight": torch.zeros(2)})
    assert seen.more("failures_total", cause="PlanError") == 1
    assert seen.more("rollbacks_total") == 0
    assert seen.more("pushes_total", kind="dense") == 0


def test_a_roll_back(server: ToyServer) -> None:
    tensors = Trainer(2).tensors
    session = server.engine.workers[0].session

    def fail() -> None:
        session._synchronize = lambda: None
        raise TransferError("out of luck")

    with WeightSync(server.url) as sync:
        sync.push(tensors, mode="sparse")
        seen = Seen(server.url)
        next(iter(tensors.values())).view(-1)[0] += 1
        session._synchronize = fail
        sync.push(tensors, mode="sparse")  # dense, in the end
    assert seen.more("rollbacks_total") == 1
    assert seen.more("failures_total", cause="TransferError") == 1
    assert seen.more("pushes_total", kind="dense") == 1


def test_an_open_update_its_abort_and_dirty(server: ToyServer) -> None:
    seen = Seen(server.url)
    http = httpx.Client(base_url=server.url, trust_env=False)
    assert http.post("/start_weight_update", json={"lease_s": 50}).status_code == 200
    assert seen.state() == ["UPDATING"]
    assert 0 < (seen.now("lease_left_seconds") or 0) <= 50
    assert (seen.now("update_open_since_seconds") or 0) > 1e9
    assert http.post("/abort_weight_update", json={}).status_code == 200
    assert http.post("/abort_weight_update", json={}).status_code == 200  # nothing is open
    assert seen.more("aborts_total", by="request") == 1
    assert seen.state() == ["IDLE"]
    assert seen.now("update_open_since_seconds") == 0
    server.engine.workers[0].ok(msg.MarkDirty("mixed"))
    http.get("/weight_transfer_status")
    assert seen.state() == ["DIRTY"]


def test_a_lease_that_ends(server: ToyServer) -> None:
    seen = Seen(server.url)
    post = httpx.post(f"{server.url}/start_weight_update", json={"lease_s": 0.1}, trust_env=False)
    assert post.status_code == 200
    deadline = time.monotonic() + 10
    while not seen.more("aborts_total", by="lease"):
        assert time.monotonic() < deadline
    assert seen.state() == ["IDLE"]


def test_several_processes_share_what_they_count(tmp_path: Path) -> None:
    """As under `--api-server-count`: files in PROMETHEUS_MULTIPROC_DIR, one collector."""
    code = (
        "from vllm_wt_plugin.server.metrics import metrics\n"
        "from vllm_wt_plugin.wire.exchange import Outcome\n"
        "from vllm_wt_plugin.wire.moved import Moved\n"
        "metrics().committed(Outcome('v', {'copy': .1}, None, '', Moved('dense', 10)), 0.2)\n"
    )
    env = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    assert registry.get_sample_value("vllm_wt_pushes_total", {"kind": "dense"}) == 2
    assert registry.get_sample_value("vllm_wt_state", {"state": "IDLE"}) == 1
    assert registry.get_sample_value("vllm_wt_phase_seconds_count", {"phase": "total"}) == 2


def expressions(x: Any) -> Iterator[str]:
    if isinstance(x, dict):
        yield from (v for k, v in x.items() if k in ("expr", "query") and isinstance(v, str))
        for v in x.values():
            yield from expressions(v)
    elif isinstance(x, list):
        for v in x:
            yield from expressions(v)


def test_every_metric_of_the_dashboard_exists(server: ToyServer) -> None:
    """Histograms and counters under the names that a scrape has them by, and labels too."""
    have: dict[str, set[str]] = {}
    text = httpx.get(f"{server.url}/metrics/", trust_env=False).text
    for family in text_string_to_metric_families(text):
        ends = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_sum", "_count"),
        }.get(family.type, ("",))
        for end in ends:
            have[family.name + end] = {n for s in family.samples for n in s.labels}
    found = list(expressions(json.loads(DASHBOARD.read_text())))
    named = {n for e in found for n in re.findall(r"vllm_wt_\w+", e)}
    assert len(named) >= 12
    assert named <= have.keys()
    values = {s for e in found for s in re.findall(r'state="(\w+)"', e)}
    assert values <= set(STATES)
