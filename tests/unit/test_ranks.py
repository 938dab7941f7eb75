"""Two trainer ranks, in processes of their own over gloo, push one sharded source together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.unit import toys
from tests.unit.test_session import Model, Worker
from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.errors import (
    RequestError,
    TransferError,
    UpdateInProgress,
    WeightSyncError,
)
from vllm_wt_plugin.trainer.client import LLMClient
from vllm_wt_plugin.trainer.packed import PackedSender
from vllm_wt_plugin.trainer.ranks import ALONE, Ranks
from vllm_wt_plugin.wire import exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.buckets import cut, size
from vllm_wt_plugin.wire.params import ParamSpec

SIZE = 1024


class Replica:
    """The packed calls of a client, on toy workers in this process."""

    name = "toy"
    in_process = False

    def __init__(self, *workers: Worker) -> None:
        self.workers = workers

    def _run(self, steps: exchange.Steps) -> exchange.Outcome:
        return exchange.run(steps, self._perform)

    def _perform(self, action: exchange.Action) -> Any:
        if isinstance(action, exchange.Call):
            return [w.call(*action.verbs) for w in self.workers]
        return False

    def start(self, body: msg.StartBody) -> tuple[str, msg.PlanReport | None]:
        done = self._run(exchange.start(body))
        return done.session, done.report

    def bucket(self, session: str, index: int) -> dict[str, float]:
        return self._run(exchange.bucket(index, session)).seconds

    def finish(self, body: msg.FinishBody) -> exchange.Outcome:
        return self._run(exchange.finish(body))

    def abort(self, session: str, reason: str) -> None:
        self._run(exchange.abort(msg.AbortBody(reason, session)))

    def shutdown(self) -> None: ...

    def close(self) -> None: ...


class Absent:
    """What a rank beside 0 has for a client: every call would fail."""

    name = "toy"


def _sharded(seed: int, mesh: Any) -> dict[str, torch.Tensor]:
    return {
        name: distribute_tensor(t, mesh, [Shard(0) if t.dim() else Replicate()])
        for name, t in toys.checkpoint(Model(), seed).items()
    }


def _scenario(rank: int, sync: WeightSync, workers: list[Worker], mesh: Any) -> None:
    """Every rank runs this; only rank 0 has workers to look at."""

    def served(seed: int) -> None:
        for w in workers:
            assert w.holds(seed)
            assert w.state.phase == "IDLE"

    for seed in (2, 3):  # the second over the buffers of the first
        report = sync.push(_sharded(seed, mesh), version=f"v{seed}")
        assert report.version == "v" + str(seed)
        served(seed)
    sender = sync._senders._last
    assert sender is not None
    assert sender.announcement.ranks == 2
    for i, w in enumerate(workers):  # each reads from a rank of its own
        (known,) = w.session.known._announced.values()
        assert known.registrations == sender.announcement.buffers[2 * i : 2 * i + 2]

    # A failure of one rank is one of all, and the next push heals what it left.
    refresh = sender._exporters[1].refresh
    if rank == 1:
        sender._exporters[1].refresh = _fails
    with pytest.raises(OSError if rank else TransferError, match="disk on fire") as error:
        sync.push(_sharded(2, mesh))
    if rank == 0:
        assert error.value.where == "trainer rank 1"  # type: ignore[union-attr]
        assert {w.state.phase for w in workers} == {"DIRTY"}
    sender._exporters[1].refresh = refresh
    sync.push(_sharded(2, mesh))
    served(2)

    # So is a refusal, which only rank 0 hears.
    for w in workers:
        w.ok(w.begin())
    with pytest.raises(UpdateInProgress) as refused:
        sync.push(_sharded(3, mesh))
    assert ("trainer rank 0" in refused.value.where) == (rank == 1)
    for w in workers:
        w.call(msg.Abort("", "enough"))
    served(2)

    # Ranks that differ are found before anything moves.
    odd = _sharded(3, mesh)
    if rank == 1:
        odd.popitem()
    with pytest.raises(WeightSyncError, match="ranks have different"):
        sync.push(odd)
    served(2)


def _fails() -> None:
    raise OSError("disk on fire")


def _rank(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        workers = [Worker() for _ in range(2)] if rank == 0 else []
        for i, w in enumerate(workers):
            w.session.known._rank = i
        sync = WeightSync("http://127.0.0.1:9", buffer_bytes=SIZE, timeout_s=60)
        sync._clients = [Replica(*workers) if workers else Absent()]  # type: ignore[list-item]
        _scenario(rank, sync, workers, mesh)
        few = Ranks.of_default_group(timeout_s=0.5)
        if rank == 0:  # rank 1 stays away
            with pytest.raises(TransferError, match="lost one another"), few.step():
                pass
    finally:
        dist.destroy_process_group()


def test_ranks_push_together_or_fail_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"),), nprocs=2)


def test_buffers_must_be_as_many_for_every_rank() -> None:
    worker = Worker()
    tensors = toys.checkpoint(Model(), 2)
    sender = PackedSender(toys.specs_of(tensors), SIZE, torch.device("cpu"), ALONE)
    odd = msgspec.structs.replace(sender.announcement, ranks=3)
    worker.refused("HandleError", worker.begin(), msg.Announce("a" * 32, odd.id, odd))
    sender.close()


def test_an_llm_in_this_process_takes_no_buffers() -> None:
    sync = WeightSync("http://127.0.0.1:9", packed=True, buffer_bytes=SIZE)
    client = LLMClient.__new__(LLMClient)
    client.name, client.in_process = "LLM", True
    sync._clients = [client]
    with pytest.raises(RequestError, match="in this process"):
        sync.push(toys.checkpoint(Model(), 2))


@pytest.mark.parametrize("buffer_bytes", [32, 100, 256, 1000, 1 << 30])
def test_packed_buffers_are_no_larger_than_the_tensors_fill(buffer_bytes: int) -> None:
    shapes = ((10, 4), (3, 4), (), (0, 4), (50, 2), (7,), (2, 3))
    specs = tuple(ParamSpec(f"t{i}", "float32", shape) for i, shape in enumerate(shapes))
    sender = PackedSender(specs, buffer_bytes, torch.device("cpu"), ALONE)
    try:
        announced = sender.announcement.buffer_bytes
        assert announced == max(map(size, sender.buckets)) <= buffer_bytes
        # What the worker finds with what is announced, and what was asked for.
        assert sender.buckets == cut(specs, announced) == cut(specs, buffer_bytes)
    finally:
        sender.close()
