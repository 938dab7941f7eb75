"""Groups beside the default one, and data through them: two real processes over gloo."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from vllm_wt_plugin import RequestError
from vllm_wt_plugin.bridge.group import init_process_group

ROOT = Path(__file__).parents[2]
DATA = [None, True, -3, 2.5, "ü", b"\x00\xff", [1, [2]], {"a": {"b": [None]}, "c": 1}]


def run(folder: Path, what: str) -> list[str]:
    """Both ranks' last lines."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.unit.test_group", f"file://{folder}/store", str(r), what],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for r in range(2)
    ]
    return [p.communicate(timeout=60)[0].strip().splitlines()[-1] for p in processes]


def test_lists_arrive_as_they_were_sent(tmp_path: Path) -> None:
    assert run(tmp_path, "data") == ["ok", "ok"]


def test_what_is_no_data_fails_on_both_sides(tmp_path: Path) -> None:
    sender, receiver = run(tmp_path, "object")
    assert sender.startswith("RequestError: only data can be broadcast: PosixPath")
    assert receiver.startswith("TransferError: rank 0 has no list to send")


def test_a_store_and_a_rendezvous_are_too_much() -> None:
    with pytest.raises(RequestError):
        init_process_group("gloo", "env://", store=dist.HashStore(), world_size=1, rank=0)
    with pytest.raises(RequestError):
        init_process_group("gloo", store=dist.HashStore())


def test_no_default_group_is_needed_or_made() -> None:
    group = init_process_group("gloo", store=dist.HashStore(), world_size=1, rank=0, group_name="a")
    assert (dist.get_world_size(group), dist.is_initialized()) == (1, False)
    dist.destroy_process_group(group)


def _main(method: str, rank: str, what: str) -> None:
    from vllm_wt_plugin.bridge.group import broadcast_object_list
    from vllm_wt_plugin.errors import WeightSyncError

    group = init_process_group(
        "gloo", method, timedelta(seconds=30), 2, int(rank), group_name="weights"
    )
    mine = DATA if what == "data" else [Path("x")]
    objects = list(mine) if rank == "0" else []
    try:
        broadcast_object_list(objects, 0, group)
    except WeightSyncError as exc:
        print(f"{type(exc).__name__}: {exc}")
    else:
        dist.barrier(group=group)
        print("ok" if objects == DATA and not dist.is_initialized() else f"got {objects}")
    dist.destroy_process_group(group)


if __name__ == "__main__":
    _main(*sys.argv[1:])
