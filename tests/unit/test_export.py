"""Live weights shown to a trainer: on every toy model, written through the views, or refused."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import msgspec
import pytest
import torch

from tests.support.shared import mapped
from tests.unit import toys
from tests.unit.test_session import A, Worker
from tests.unit.toys import live_tensors, same_bits, specs_of
from vllm_wt_plugin.transport import shm
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.transport.layout import Span
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.bridge import Exported
from vllm_wt_plugin.wire.params import ParamSpec


class Attaching:
    """A trainer that asks for views and holds its segment."""

    def __init__(self, worker: Worker, seed: int = 2) -> None:
        self.worker = worker
        self.wanted = toys.checkpoint(worker.kind(), seed)
        here = torch.zeros(1, dtype=torch.uint8).untyped_storage()
        self.presence = shm.Segment(here, Span(0, 1, "trainer"))
        self.importer = Importer(write=True)
        self.key = secrets.token_hex(16)

    def verb(self, specs: tuple[ParamSpec, ...] | None = None) -> msg.Export:
        specs = specs_of(self.wanted) if specs is None else specs
        return msg.Export(self.key, specs, "a trainer", self.presence.handle)

    def views(self) -> dict[str, torch.Tensor]:
        reply = self.worker.ok(self.verb())
        self.exported = msgspec.convert(reply.info["exported"], Exported)
        return self.importer.open(self.exported.registration)

    def write(self, views: dict[str, torch.Tensor]) -> None:
        for name, t in views.items():
            t.copy_(self.wanted[name])


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    shm.sweep_orphans()


def attached(worker: Worker) -> dict[str, str]:
    found: dict[str, str] = worker.ok(msg.Status()).info["attached"]
    return found


@pytest.mark.parametrize("kind", toys.TOYS.values(), ids=toys.TOYS.keys())
def test_written_through_views_or_refused(kind: type[toys.Toy]) -> None:
    """A commit after the writes leaves what a fresh load would; a refusal leaves all as it was."""
    worker = Worker(kind)
    trainer = Attaching(worker)
    places = {n: t.data_ptr() for n, t in live_tensors(worker.host.model).items()}
    reply = worker.call(trainer.verb())
    if reply.error is not None:
        assert reply.error["code"] == "PlanError"
        assert reply.error["where"].split(" ")[0] in trainer.wanted
        assert {n: t.data_ptr() for n, t in live_tensors(worker.host.model).items()} == places
        assert attached(worker) == {}
        assert worker.holds(1)
        return
    views = trainer.views()
    assert views.keys() == trainer.wanted.keys()
    assert worker.holds(1)
    moved = {n: t.data_ptr() for n, t in live_tensors(worker.host.model).items()}
    worker.ok(worker.begin(), msg.Touch(A, ""))
    trainer.write(views)
    worker.ok(msg.Commit(A, "v2"))
    assert worker.holds(2)
    assert {n: t.data_ptr() for n, t in live_tensors(worker.host.model).items()} == moved


@pytest.mark.parametrize("name", ["fused", "experts", "tied_parameter", "mla"])
def test_what_must_be_shown_is(name: str) -> None:
    kind = {
        "fused": toys.Fused, "experts": toys.MoE, "tied_parameter": toys.TiedParameter,
        "mla": toys.MLA,
    }[name]  # fmt: skip
    assert Attaching(Worker(kind)).views()


def test_every_refused_parameter_is_named_with_its_reason() -> None:
    worker = Worker()  # packed, opaque and plain modules
    error = worker.refused("PlanError", Attaching(worker).verb())
    assert "cannot be trained in vLLM's memory" in error["error"]
    assert "computes with another form of it" in error["error"]


def test_specs_must_cover_the_model() -> None:
    worker = Worker(toys.Fused)
    trainer = Attaching(worker)
    specs = specs_of(trainer.wanted)
    assert "no name covers" in worker.refused("PlanError", trainer.verb(specs[1:]))["error"]
    twice = worker.refused("RequestError", trainer.verb((specs[0], *specs)))
    assert "given twice" in twice["error"]
    extra = (*specs, ParamSpec("what.is.this", "float32", (2,)))
    assert worker.refused("PlanError", trainer.verb(extra))["where"].startswith("what.is.this")


def test_without_specs_the_served_checkpoint_is_shown_and_nobody_need_hold_on() -> None:
    worker = Worker(toys.Fused)
    reply = worker.ok(msg.Export(A, None, "a reader of the file", None))
    exported = msgspec.convert(reply.info["exported"], Exported)
    assert exported.mappings.keys() == toys.checkpoint(worker.kind(), 1).keys()
    assert attached(worker) == {A: "a reader of the file"}
    worker.ok(msg.Detach(""))
    assert attached(worker) == {}


def test_several_workers_are_refused() -> None:
    worker = Worker(toys.Fused)
    worker.session.exports.world_size = 2
    error = worker.refused("UnsupportedVLLM", Attaching(worker).verb())
    assert "one worker, this engine has 2" in error["error"]


def test_a_touched_update_that_fails_is_dirty_and_the_next_heals() -> None:
    worker = Worker(toys.Fused)
    trainer = Attaching(worker)
    views = trainer.views()
    worker.ok(worker.begin(), msg.Abort(A, "changed its mind"))
    assert worker.state.phase == "IDLE"
    worker.ok(worker.begin(), msg.Touch(A, trainer.key), msg.Abort(A, "out of memory"))
    assert worker.state.phase == "DIRTY"
    assert "out of memory" in worker.state.reason
    worker.ok(worker.begin(), msg.Touch(A, trainer.key))
    trainer.write(views)
    worker.ok(msg.Commit(A, "healed"))
    assert (worker.state.phase, worker.state.version) == ("IDLE", "healed")
    assert worker.holds(2)


def test_only_who_is_attached_may_say_it_writes() -> None:
    worker = Worker(toys.Fused)
    trainer = Attaching(worker)
    assert worker.refused("NoUpdate", worker.begin(), msg.Touch(A, ""))["next_step"]
    worker.ok(msg.Abort("", ""))
    trainer.views()
    assert attached(worker) == {trainer.key: "a trainer"}
    worker.refused("NoUpdate", worker.begin(), msg.Touch(A, "f" * 32))
    worker.ok(msg.Abort("", ""))
    worker.ok(msg.Detach(trainer.key))
    assert attached(worker) == {}
    worker.refused("NoUpdate", worker.begin(), msg.Touch(A, ""))


def test_a_trainer_that_died_is_not_attached() -> None:
    worker = Worker(toys.Fused)
    trainer = Attaching(worker)
    trainer.views()
    trainer.presence.close()
    assert attached(worker) == {}


def test_export_waits_its_turn() -> None:
    worker = Worker(toys.Fused)
    trainer = Attaching(worker)
    worker.ok(worker.begin())
    worker.refused("UpdateInProgress", trainer.verb())
    worker.ok(msg.Abort("", ""))
    worker.session.asleep.add("weights")
    worker.refused("EngineAsleep", trainer.verb())


def test_pushes_registered_before_the_move_write_to_the_new_memory() -> None:
    worker = Worker(toys.Fused)
    worker.push(3)
    views = Attaching(worker).views()
    worker.push(4)
    assert worker.holds(4)
    wanted = toys.checkpoint(worker.kind(), 4)
    assert all(same_bits(t, wanted[n].to(t.dtype)) for n, t in views.items())


def test_a_second_trainer_sees_the_same_memory_and_nothing_is_copied_again() -> None:
    worker = Worker(toys.Fused)
    first, second = Attaching(worker), Attaching(worker, seed=3)
    a = first.views()
    files = mapped()
    b = second.views()
    assert mapped() == files
    second.write(b)
    assert all(same_bits(a[n], b[n]) for n in a)
    assert len(attached(worker)) == 2
