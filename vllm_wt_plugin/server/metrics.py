"""What Prometheus sees of weight sync, on vLLM's own `/metrics`.

One recorder for each API process. Counters of several processes are added up; gauges show what the
process that looked last has seen.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from vllm_wt_plugin.wire.exchange import Outcome
from vllm_wt_plugin.wire.messages import State

SECONDS = (
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
)  # fmt: skip
SHARES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
STATES = ("IDLE", "UPDATING", "DIRTY")


class Metrics:
    """`registry`: vLLM's is prometheus_client's own."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, labels, registry=registry)

        self.pushes = counter("vllm_wt_pushes", "Committed updates", ("kind",))
        self.failures = counter("vllm_wt_failures", "Calls that failed, by error", ("cause",))
        self.aborts = counter("vllm_wt_aborts", "Updates that were ended, by whom", ("by",))
        self.rollbacks = counter("vllm_wt_rollbacks", "Half-written updates that were undone")
        self.bytes = counter("vllm_wt_bytes", "Bytes that updates brought", ("kind",))
        self.changed = counter("vllm_wt_changed_elements", "Elements that sparse updates changed")
        self.density = Histogram(
            "vllm_wt_density", "Share of the elements that a sparse update changed",
            buckets=SHARES, registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "vllm_wt_phase_seconds", "Time of an update by phase; `total` is the whole call",
            ("phase",), buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.state = gauge("vllm_wt_state", "1 for the state of the weights", ("state",))
        self.since = gauge(
            "vllm_wt_update_open_since_seconds", "Unix time the open update began; 0: none is open"
        )
        self.lease = gauge("vllm_wt_lease_left_seconds", "What the open update's lease had left")
        self.last_push = gauge("vllm_wt_last_push_timestamp_seconds", "Unix time of the last one")
        # prometheus_client cannot take a label back from several processes' files.
        self._names_versions = "PROMETHEUS_MULTIPROC_DIR" not in os.environ
        self._named = ""
        self.version = gauge("vllm_wt_version_info", "1 for the served version", ("version",))
        self.last: dict[str, Any] | None = None  # for /weight_transfer_status

    def committed(self, outcome: Outcome, seconds: float) -> None:
        """A call that went well; only one that committed something counts as a push."""
        for phase, took in outcome.seconds.items():
            self.seconds.labels(phase).observe(took)
        moved = outcome.moved
        if moved is None:
            return
        self.seconds.labels("total").observe(seconds)
        self.pushes.labels(moved.kind).inc()
        self.bytes.labels(moved.kind).inc(moved.bytes)
        if moved.kind == "sparse":
            self.changed.inc(moved.changed)
            self.density.observe(moved.share or 0.0)
        now = time.time()
        self.last_push.set(now)
        self.last = {
            "version": outcome.version, "kind": moved.kind, "at": now, "seconds": seconds,
            "bytes": moved.bytes, "changed": moved.share,
        }  # fmt: skip
        self.saw(State("IDLE", outcome.version))

    def failed(self, cause: str, *, rolled_back: bool) -> None:
        self.failures.labels(cause).inc()
        if rolled_back:
            self.rollbacks.inc()

    def saw(self, state: State) -> None:
        """The state of the worst rank."""
        for name in STATES:
            self.state.labels(name).set(name == state.phase)
        open_ = state.phase == "UPDATING"
        self.since.set(state.since if open_ else 0)
        self.lease.set(state.lease_left_s if open_ else 0)
        if self._names_versions and state.version != self._named:
            self.version.clear()
            self.version.labels(state.version).set(1)
            self._named = state.version


@functools.cache
def metrics() -> Metrics:
    """This process's: a name can be registered once."""
    return Metrics()
