"""Pushes of patches into sessions on toy models: the same bits as dense ones, or nothing at all.

The toy has modules in place, packed, derived late, loaded by the loader, and tied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from tests.unit import toys
from tests.unit.test_session import Worker
from tests.unit.toys import same_bits
from vllm_wt_plugin.errors import TransferError, WeightSyncError
from vllm_wt_plugin.sparse.patch import SparseWeightPatch
from vllm_wt_plugin.trainer.delta import Changes, Snapshot
from vllm_wt_plugin.trainer.listing import Lister
from vllm_wt_plugin.trainer.patching import PatchSender
from vllm_wt_plugin.transport.memory import MemoryExporter
from vllm_wt_plugin.transport.patches import share
from vllm_wt_plugin.wire import exchange
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.patches import PatchPush, layout, widths


class Pair:
    """A trainer and the workers (ranks that hold the same) it has pushed version 1 to."""

    def __init__(self, ranks: int = 1, shadow: bool = False) -> None:
        self.workers = [Worker(rank=r) for r in range(ranks)]
        for w in self.workers:
            w.session.known.keeps_shadow = shadow
        self.trainer = self.workers[0].trainer(2)
        self.tensors = self.trainer.tensors
        self.sender = PatchSender(MemoryExporter())
        reg = self.trainer.register()
        done = self.run(msg.PushRequest(reg.id, reg, "1"))
        assert done.report is not None
        self.plan = done.report
        self.lister = Lister()
        self.snapshot = Snapshot(self.lister.list(self.tensors), self.plan, host=False)

    def run(self, request: msg.PushRequest | PatchPush) -> exchange.Outcome:
        return exchange.run(exchange.push(request), self.perform)

    def run_steps(self, steps: exchange.Steps) -> exchange.Outcome:
        return exchange.run(steps, self.perform)

    def perform(self, action: exchange.Action) -> Any:
        match action:
            case exchange.Call():
                return [w.call(*action.verbs) for w in self.workers]
            case exchange.IsPaused():
                return False

    def change(self, share: float = 0.2, only: str = "") -> Changes:
        g = torch.Generator().manual_seed(7)
        for name, t in self.tensors.items():
            if name.startswith(only):
                flip = torch.rand(t.shape, generator=g) < share
                t.copy_(torch.where(flip, t + 1, t))
        found = self.changes()
        return found

    def changes(self) -> Changes:
        found = self.snapshot.changes(self.lister.list(self.tensors), 1.0)
        assert found is not None
        return found

    def load(self, changes: Changes, base: str = "1", version: str = "2") -> PatchPush:
        self.sender.load(changes, self.snapshot.first(), base, version, "me")
        assert self.sender.push is not None
        assert self.sender.registration is not None
        return msgspec.structs.replace(self.sender.push, register=self.sender.registration)

    def assert_serves(self, tensors: dict[str, torch.Tensor], version: str) -> None:
        for w in self.workers:
            state = w.session.state()
            assert (state.phase, state.version) == ("IDLE", version), state
            want = toys.ToyHost(w.kind())
            want.first_load([(n, t.clone()) for n, t in tensors.items()])
            a, b = toys.live_tensors(w.host.model), toys.live_tensors(want.model)
            assert [n for n in b if not same_bits(a[n], b[n])] == []


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_patches_equal_a_fresh_load(ranks: int, shadow: bool) -> None:
    pair = Pair(ranks, shadow)
    for step in range(2, 6):
        changes = pair.change()
        assert bool(changes.whole) is not shadow
        pair.run(pair.load(changes, str(step - 1), str(step)))
        pair.snapshot.accept(changes)
        pair.assert_serves(pair.tensors, str(step))
    assert pair.changes().changed == 0


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("shadow", [False, True])
def test_patches_after_another_dense_push(shadow: bool, same: bool) -> None:
    """Whose tensors a shadow then holds, and not those of before."""
    pair = Pair(1, shadow)
    for step in (2, 5):
        changes = pair.change()
        pair.run(pair.load(changes, str(step - 1), str(step)))
        pair.assert_serves(pair.tensors, str(step))
        if not same:
            pair.change()
        for again in (step + 1, step + 2):
            reg = pair.trainer.register()
            pair.run(msg.PushRequest(reg.id, reg, str(again)))
        pair.snapshot.retake(pair.lister.list(pair.tensors))


def test_no_changes_advance_the_version() -> None:
    pair = Pair()
    pair.run(pair.load(pair.change(share=0.0)))
    pair.assert_serves(pair.tensors, "2")


def test_what_was_compared_ahead_counts_for_the_same_tensors_only() -> None:
    pair = Pair()
    listed = pair.lister.list(pair.tensors)
    assert pair.snapshot.begin(listed) is None  # nothing is prepared yet
    pair.change()
    begun = pair.snapshot.begin(listed)
    assert begun is not None
    never = begun._replace(result=lambda capacity: pytest.fail(f"asked for {capacity}"))
    name = next(iter(pair.tensors))
    pair.tensors[name] = pair.tensors[name] + 1
    moved = pair.lister.list(pair.tensors)
    found = pair.snapshot.changes(moved, 1.0, never)
    assert found is not None
    pair.run(pair.load(found))
    pair.assert_serves(pair.tensors, "2")
    assert pair.snapshot.begin(listed) is None
    assert pair.snapshot.begin(moved) is not None
    pair.tensors[name].untyped_storage().resize_(0)
    assert pair.snapshot.begin(moved) is None  # to read there would be fatal


def refused(pair: Pair, push: PatchPush, match: str, old: dict[str, torch.Tensor]) -> None:
    with pytest.raises(WeightSyncError, match=match):
        pair.run(push)
    pair.assert_serves(old, "1")


def test_what_was_lost_repeated_or_reordered_is_refused() -> None:
    pair = Pair()
    first = pair.load(pair.change(), "1", "2")
    old = copies(pair.tensors)
    pair.run(first)
    for base in ("1", "3"):  # the same again; one whose base never came
        with pytest.raises(WeightSyncError, match=f"start from version '{base}'.*holds '2'"):
            pair.run(msgspec.structs.replace(first, base_version=base))
        pair.assert_serves(old, "2")


@pytest.mark.parametrize("shadow", [False, True])
@pytest.mark.parametrize("what", ["values", "indices", "old"])
def test_what_is_corrupted_is_refused(what: str, shadow: bool) -> None:
    """Without a shadow, tensors in full come with the patches: those are never written then."""
    pair = Pair(shadow=shadow)
    old = copies(pair.tensors)
    push = pair.load(pair.change())
    buffer = pair.sender.buffer
    assert buffer is not None
    if what == "values":
        at = layout(widths(push.specs), push.num_updates_list, push.whole).sections[0].values_at
        buffer[at] ^= 1
    elif what == "indices":
        section = buffer[:4].view(torch.int32)
        section[0] += 1 if int(section[0]) + 1 != int(buffer[4:8].view(torch.int32)) else -1
    else:  # the engine's weights have drifted
        push = msgspec.structs.replace(push, sums=[s ^ 8 for s in push.sums])
    refused(pair, push, "checksum|index", old)


@pytest.mark.parametrize("shadow", [False, True])
def test_parts_that_do_not_add_up_are_taken_back(shadow: bool) -> None:
    """Each rank says that it has a part alone: only all together see what is wrong."""
    pair = Pair(2, shadow)
    old = copies(pair.tensors)
    push = pair.load(pair.change())
    for rank, worker in enumerate(pair.workers):
        places = worker.session.known.patched(push)[0].places
        places._held = {n: (False, f"part of rank {rank}") for n in push.names}
    refused(pair, push, "the checksum of .* taken back; push dense", old)
    assert all(w.session.last is None for w in pair.workers)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"dtype_names": ["int8"]}, "int8 values, the engine holds"),
        ({"shapes": [(3,)]}, "must|shape|does not"),
        ({"registration": "f" * 32, "register": None}, "does not hold this buffer"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], match: str) -> None:
    pair = Pair()
    old = copies(pair.tensors)
    name = next(n for n in pair.tensors if n not in pair.plan.whole)
    spec = pair.load(pair.change(share=0.0)).specs[0]
    assert spec.name == name
    push = pair.load(pair.changes())
    refused(pair, msgspec.structs.replace(push, **change), match, old)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("at", ["apply", "commit"])
def test_a_failure_puts_the_old_bits_back_on_every_rank(ranks: int, at: str) -> None:
    """The last rank fails when it applies, or after all others have committed."""
    pair = Pair(ranks, shadow=True)
    old = copies(pair.tensors)
    push = pair.load(pair.change())
    last = pair.workers[-1].session

    def fail(*_: object) -> None:
        last._synchronize, last._after_commit = lambda: None, lambda: None
        raise TransferError("out of luck")

    if at == "apply":
        last._synchronize = fail
    else:
        last._after_commit = fail
    with pytest.raises(TransferError, match="out of luck"):
        pair.run(push)
    pair.assert_serves(old, "1")
    pair.run(push)
    pair.assert_serves(pair.tensors, "2")


def by_hand(pair: Pair, changes: Changes, names: set[str] | None = None) -> list[SparseWeightPatch]:
    """The changes as any trainer may have them: apart, in no order, in torch's dtypes."""
    out = []
    for d in changes.diffs:
        for spec, indices, words in d.group.rows():
            if names is None or spec.name in names:
                values = words.view(getattr(torch, spec.dtype))
                order = torch.randperm(len(indices))
                out.append(SparseWeightPatch(spec.name, indices[order], values[order], spec.shape))
    return out


def test_patches_by_vllms_calls() -> None:
    """Start, two update calls, finish; then an update that fails in its second call."""
    pair = Pair(ranks=2, shadow=True)
    changes, old = pair.change(), copies(pair.tensors)
    names = sorted({s.name for d in changes.diffs for s in d.group.specs})
    pair.run_steps(exchange.start(msg.StartBody("me")))
    with MemoryExporter() as one, MemoryExporter() as two:
        for part, exporter in ((names[::2], one), (names[1::2], two)):
            given = by_hand(pair, changes, set(part))
            pair.run_steps(exchange.update(share(given, exporter)))
    pair.run_steps(exchange.finish(msg.FinishBody("2")))
    pair.assert_serves(pair.tensors, "2")
    pair.snapshot.accept(changes)

    old = copies(pair.tensors)
    changes = pair.change()
    pair.run_steps(exchange.start(msg.StartBody("me")))
    with MemoryExporter() as one, MemoryExporter() as two:
        given = by_hand(pair, changes)
        pair.run_steps(exchange.update(share(given[:2], one)))
        given[3] = replace(given[3], indices=given[3].indices[:1].expand(len(given[3].indices)))
        with pytest.raises(WeightSyncError, match="given twice") as caught:
            pair.run_steps(exchange.update(share(given[2:], two)))
    assert given[3].name in caught.value.where
    pair.assert_serves(old, "2")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"name": "nobody"}, "no such tensor"),
        ({"indices": torch.tensor([0, 10**6])}, "index 1000000 of"),
        ({"indices": torch.tensor([-1, 0])}, "index -1 of"),
        ({"indices": torch.tensor([5, 5])}, "index 5 is given twice"),
        ({"indices": torch.tensor([0])}, "1 indices for 2 values"),
        ({"indices": torch.tensor([0.0, 1.0])}, "indices are torch.float32"),
        ({"values": torch.zeros(2, dtype=torch.int8)}, "int8 values, the engine holds"),
        ({"values": torch.zeros(2, 1)}, "one dimension"),
        ({"full_shape": None}, "needs its `full_shape`"),
        ({"full_shape": (3, 3)}, "is for shape"),
    ],
)
def test_patches_that_do_not_fit_name_the_parameter(change: dict[str, Any], match: str) -> None:
    pair = Pair()
    name = next(n for n in pair.tensors if n not in pair.plan.whole)
    t = pair.tensors[name]
    good = SparseWeightPatch(name, torch.tensor([0, 1]), t.reshape(-1)[:2] + 1, tuple(t.shape))
    bad = replace(good, **change)
    pair.run_steps(exchange.start(msg.StartBody("me")))
    with MemoryExporter() as exporter, pytest.raises(WeightSyncError, match=match) as caught:
        pair.run_steps(exchange.update(share([bad], exporter)))
    assert bad.name in caught.value.where
    pair.run_steps(exchange.abort(msg.AbortBody("over")))
    pair.assert_serves(pair.tensors, "1")


def test_no_patches_at_all() -> None:
    with MemoryExporter() as exporter, pytest.raises(WeightSyncError, match="no patches"):
        share([], exporter)


def test_patches_and_tensors_do_not_mix() -> None:
    pair = Pair()
    worker = pair.workers[0]
    pair.run_steps(exchange.start(msg.StartBody("me")))
    session = worker.session.state().session
    with MemoryExporter() as exporter:
        pair.run_steps(exchange.update(share(by_hand(pair, pair.change()), exporter)))
        worker.ok(worker.prepare(2, session, "mla.other.weight"))
        assert "came as patches, and now" in worker.call(msg.Apply(session)).error["error"]  # type: ignore[index]
    assert worker.session.state().phase == "IDLE"


def test_a_bare_patch_for_a_packed_module_says_what_to_do() -> None:
    pair = Pair()
    old = copies(pair.tensors)
    with_shadow = msgspec.structs.replace(pair.plan, shadowed=True)
    pair.snapshot = Snapshot(pair.lister.list(pair.tensors), with_shadow, host=False)
    refused(pair, pair.load(pair.change()), "takes no patches.*send it in full", old)


def test_dirty_weights_take_no_patches() -> None:
    pair = Pair()
    pair.workers[0].ok(msg.MarkDirty("mixed"))
    with pytest.raises(WeightSyncError, match="need whole weights"):
        pair.run(pair.load(pair.change()))
    assert pair.workers[0].session.state().phase == "DIRTY"
