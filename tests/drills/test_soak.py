"""Pushes without end, dense and sparse in turn, while requests run: nothing is lost, nothing grows.

Short: on a server that other tests share. Long: 520 pushes, patches in place.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.drills import figures
from tests.drills.load import Ledger, Load, Model
from tests.support import fleet
from tests.support.server import Server
from vllm_wt_plugin import WeightSync

pytestmark = pytest.mark.server

MIB = 1 << 20
CLIENTS = 3
GROWTH = {"rss_mib": 24.0, "fds": 2, "shm_files": 1}  # that is still flat
Usage = dict[str, dict[str, float]]


def usage(server: Server) -> Usage:
    """Of the trainer (with the load: this process) and of the server's processes together."""
    group = [p for p in psutil.process_iter() if _group(p.pid) == server.process.pid]
    return {"trainer": _of([psutil.Process()]), "server": _of(group)}


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


def _of(processes: list[psutil.Process]) -> dict[str, float]:
    rows = [p.memory_info() for p in processes]
    mapped = {m.path for p in processes for m in p.memory_maps() if "/dev/shm/wt_" in m.path}
    return {
        "processes": len(processes),
        "rss_mib": round(sum(r.rss for r in rows) / MIB, 1),
        "fds": sum(p.num_fds() for p in processes),
        "shm_files": len(mapped),
    }


def growth(seen: list[Usage]) -> Usage:
    """Medians of the last quarter less those of the second: the first warms up."""
    quarter = len(seen) // 4
    early, late = seen[quarter : 2 * quarter], seen[-quarter:]
    return {
        side: {
            what: statistics.median(u[side][what] for u in late)
            - statistics.median(u[side][what] for u in early)
            for what in GROWTH
        }
        for side in seen[0]
    }


def soak(server: Server, pushes: int) -> dict[str, Any]:
    model, ledger = Model(), Ledger([server.url])
    modes = {"dense": 0, "sparse": 0}
    seen: list[Usage] = []
    every = 1 + pushes // 100
    begun = time.monotonic()
    with WeightSync(server.url) as sync:
        sync.push(model.tensors, 0, mode="sparse")
        with Load(ledger, CLIENTS) as load:
            for version in range(1, pushes + 1):
                model.become(version)
                ledger.begun = version
                # After one by "dense" nothing is known of what the server holds: the next one is
                # dense as well, whatever its mode.
                mode = "sparse" if version % 4 else "dense"
                report = sync.push(model.tensors, version, mode=mode)
                ledger.done[server.url] = version
                modes["dense" if report.changed is None else "sparse"] += 1
                if version % every == 0:
                    seen.append(usage(server))
        clean = sync.verify()
    return {
        "seconds": round(time.monotonic() - begun, 1), "pushes": pushes, **modes,
        "requests": load.figures(), "clean": clean.ok,
        "unseen": sum(map(len, clean.unseen.values())),
        "first": seen[len(seen) // 4], "last": seen[-1], "growth": growth(seen),
    }  # fmt: skip


FORMS = [("short", 8), pytest.param("long", 520, marks=pytest.mark.drill)]


@pytest.mark.parametrize(("form", "pushes"), FORMS)
def test_soak(
    serve: Callable[..., Server], checkpoint: Callable[..., Path], form: str, pushes: int
) -> None:
    if form == "short":
        server = fleet.plain(serve, checkpoint)
    else:
        inplace = {"WT_CPU_INPLACE": "1"}
        server = serve(checkpoint("qwen3", 1), args=("--enable-scale-out",), env=inplace)
    try:
        found = soak(server, pushes)
    finally:
        fleet.push(server, 1, "after the soak")
    figures.keep("soak", form, found)
    requests = found["requests"]
    assert (requests["lost"], requests["mixed"]) == (0, 0), requests["flaws"]
    assert requests["answered"] == requests["requests"] > pushes
    assert found["sparse"] >= pushes // 2
    assert found["dense"] >= pushes // 4
    assert found["clean"]
    if form == "long":
        assert found["unseen"] == 0
        over = {
            s: {w: n for w, n in g.items() if n > GROWTH[w]} for s, g in found["growth"].items()
        }
        assert over == {"trainer": {}, "server": {}}
