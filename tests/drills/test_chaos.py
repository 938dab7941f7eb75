"""SIGKILL and SIGSTOP of the trainer and of one of two servers, at random, while it pushes and
requests run. Then both servers must serve the version that was committed last, bit for bit.

Short: toy workers, which serve no requests. Long: two vLLM servers, ten minutes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.drills import figures
from tests.drills.load import Ledger, Load, Model
from tests.drills.trainer import Trainer
from tests.support import models
from tests.support.fleet import paused
from tests.support.server import Server
from tests.support.toy_replica import ToyReplica
from tests.support.waiting import until
from vllm_wt_plugin import WeightSync

CALM_S = 90.0  # until both have taken a push after the last fault: a killed trainer's lease is 60 s


class Victim(Protocol):
    """A server that can be killed and started again at the same address."""

    url: str

    def start(self) -> object: ...

    def signal(self, number: int) -> None: ...

    def status(self) -> dict[str, Any]: ...


class Fleet:
    """Two servers, the trainer that pushes to them, and what it says."""

    def __init__(self, kind: str, servers: Sequence[Victim]) -> None:
        self.kind, self.servers = kind, servers
        self.urls = [s.url for s in servers]
        self.ledger = Ledger(self.urls)
        self.pushes: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.whole = 0  # the version that all have taken last
        self.trainer: Trainer | None = None
        self._listener = threading.Thread()

    def train(self, way: str) -> None:
        """Start a trainer that goes on after the version that was begun last."""
        self.trainer = Trainer(self.kind, self.urls, self.ledger.begun + 1, way)
        self._listener = threading.Thread(target=self._listen, args=(self.trainer,))
        self._listener.start()

    def _listen(self, trainer: Trainer) -> None:
        with trainer.says, contextlib.suppress(EOFError):
            while True:
                self._heard(trainer.says.recv())

    def _heard(self, said: dict[str, Any]) -> None:
        if "begun" in said:
            self.ledger.begun = said["begun"]
            return
        version, failed = said["done"], said["failed"]
        for url in self.urls:
            if url not in failed and self.ledger.life[url] % 2 == 0:  # else it came late
                self.ledger.done[url] = version
        for error in failed.values():
            self.errors[error.partition(":")[0]] += 1
        self.pushes["failed" if len(failed) == len(self.urls) else "one" if failed else "both"] += 1
        if not failed:
            self.whole = version

    def end_trainer(self, number: int) -> int:
        """SIGKILL, or SIGTERM: after the push that it is at. The exit code."""
        assert self.trainer is not None
        self.trainer.signal(number)
        code = self.trainer.wait()
        self._listener.join(20)
        return code

    def kill(self) -> None:
        """Whatever is left. Idempotent."""
        if self.trainer is not None:
            self.trainer.kill()


class Chaos:
    """One fault after another, each ended before the next."""

    def __init__(self, fleet: Fleet, rng: random.Random, longest: float) -> None:
        self.fleet, self.rng, self.longest = fleet, rng, longest
        self.faults: Counter[str] = Counter()

    def one(self, what: str | None = None) -> None:
        what = what or self.rng.choice(FAULTS)
        self.faults[what] += 1
        server, both = self.rng.choice(self.fleet.servers), self.rng.random() < 0.3
        match what:
            case "trainer killed":
                self.kill_trainer()
            case "trainer stopped":
                self.fleet.trainer.signal(signal.SIGSTOP)
                self._wait()
                self.fleet.trainer.signal(signal.SIGCONT)
            case "server stopped":
                server.signal(signal.SIGSTOP)
                self._wait()
                if both:
                    self.one("trainer killed")
                server.signal(signal.SIGCONT)
            case "server killed":
                self.kill_server(server, both)

    def kill_trainer(self) -> None:
        self.fleet.end_trainer(signal.SIGKILL)
        self.fleet.train(self.rng.choice(["direct", "direct", "direct", "packed"]))

    def kill_server(self, server: Victim, both: bool) -> None:
        self.fleet.ledger.life[server.url] += 1
        server.signal(signal.SIGKILL)
        self._wait()
        if both:
            self.one("trainer killed")
        self.fleet.ledger.done[server.url] = 0  # it starts from its checkpoint
        server.start()
        self.fleet.ledger.life[server.url] += 1

    def _wait(self) -> None:
        time.sleep(self.rng.uniform(0.2, self.longest))


FAULTS = ("trainer killed", "trainer stopped", "server killed", "server stopped")


def calm(fleet: Fleet) -> int:
    """After the last fault: the version of a push that both have taken, with the trainer gone."""
    begun = fleet.ledger.begun
    assert until(lambda: fleet.whole > begun, CALM_S), fleet.errors
    assert fleet.end_trainer(signal.SIGTERM) == 0
    return fleet.whole


def told(fleet: Fleet, chaos: Chaos, last: int, seed: int, seconds: float) -> dict[str, Any]:
    return {
        "seed": seed, "seconds": round(seconds, 1), "faults": dict(chaos.faults),
        "pushes": {"begun": fleet.ledger.begun, **fleet.pushes}, "errors": dict(fleet.errors),
        "last committed": last,
        "served": [[(t := s.status())["state"], t["version"]] for s in fleet.servers],
    }  # fmt: skip


def test_toy_workers() -> None:
    """Each fault once, in a random order."""
    seed, begun = figures.seed(), time.monotonic()
    servers = [ToyReplica(), ToyReplica()]
    rng = random.Random(seed)
    fleet = Fleet("toy", [s.wait() for s in servers])
    chaos = Chaos(fleet, rng, 1.0)
    try:
        fleet.train("direct")
        for what in rng.sample(FAULTS, len(FAULTS)):
            assert until(lambda: fleet.whole > 0, 30)
            time.sleep(rng.uniform(0, 0.5))
            chaos.one(what)
        last = calm(fleet)
        serve = [s.serves(last, str(last)) for s in servers]
        figures.keep("chaos", "short", told(fleet, chaos, last, seed, time.monotonic() - begun))
    finally:
        fleet.kill()
        for s in servers:
            s.end()
    assert serve == [True, True]


@pytest.mark.server
@pytest.mark.drill
def test_vllm_for_ten_minutes(tmp_path: Path) -> None:
    seed, minutes = figures.seed(), float(os.environ.get("DRILL_MINUTES", "10"))
    held = Model()
    made = models.build("qwen3", 1)
    made.load_state_dict(held.tensors)
    inplace = {"WT_CPU_INPLACE": "1"}
    folder = models.save(made, tmp_path / "version-0")
    servers = [
        Server(folder, tmp_path / f"{i}.log", args=("--enable-scale-out",), env=inplace)
        for i in range(2)
    ]
    fleet = Fleet("qwen3", servers)
    chaos = Chaos(fleet, random.Random(seed), 12.0)
    try:
        for s in servers:
            s.start()
        fleet.train("direct")
        assert until(lambda: fleet.whole > 0, CALM_S)
        begun = time.monotonic()
        with Load(fleet.ledger, 2) as load:
            while time.monotonic() < begun + 60 * minutes:
                time.sleep(chaos.rng.uniform(0.5, 6))
                chaos.one()
            last = calm(fleet)
        held.become(last)
        with WeightSync(fleet.urls) as sync:
            found = sync.verify(held.tensors)
        report = told(fleet, chaos, last, seed, time.monotonic() - begun)
        report |= {"requests": load.figures(), "differ": found.differ, "unseen": found.unseen}
        figures.keep("chaos", "long", report)
        for s in servers:
            state = s.status()
            assert (state["state"], state["version"]) == ("IDLE", str(last))
            assert not paused(s)
        said = [s.generations() for s in servers]
    finally:
        fleet.kill()
        for s in servers:
            s.stop()
    assert chaos.faults.keys() == set(FAULTS)
    assert found.ok
    assert not any(found.unseen.values())
    assert said[0] == said[1]
    counts = load.figures()
    assert (counts["lost"], counts["mixed"]) == (0, 0), counts["flaws"]
