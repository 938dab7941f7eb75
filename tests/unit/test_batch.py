"""Tables of copies, as a GPU gets them (`tests/gpu/test_batch.py` runs the kernels)."""

from __future__ import annotations

import pytest
import torch

from vllm_wt_plugin.worker.plan.batch import Moving, Pair, _Kind, _Launch, as_block

FLAT, ROWS = (_Kind("int64", "int64", flat, True) for flat in (True, False))
SOURCE = torch.arange(4096, dtype=torch.int64)


def destinations(*at: int) -> list[torch.Tensor]:
    """Two tensors that lie at these elements of one memory."""
    memory = torch.zeros(1 << 14, dtype=torch.int64)
    return [memory[i : i + n] for i, n in zip(at, (1024, 2048), strict=True)]


def launches(into: list[torch.Tensor]) -> list[_Launch]:
    flat = [(into[0][:512], SOURCE[:512]), (into[1][1024:], SOURCE[1024:2048])]
    rows = [(into[1][:1024].view(8, 128)[:, :64], SOURCE[:512].view(8, 64))]
    return [_launch(FLAT, flat), _launch(ROWS, rows)]


def _launch(kind: _Kind, pairs: list[Pair]) -> _Launch:
    blocks = [(p, as_block(*p)) for p in pairs]
    return _Launch(kind, [(p, b) for p, b in blocks if b is not None])


@pytest.mark.parametrize("to", [(0, 2048), (4096, 1024), (10, 5000), (2, 2050)])
def test_copies_follow_tensors_that_are_made_anew(
    to: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[_Launch] = []
    monkeypatch.setattr(_Launch, "run", lambda launch: ran.append(launch))
    first, then = destinations(0, 2048), destinations(*to)
    tables = launches(first)
    moving = Moving(tables, [t.data_ptr() for t in first])
    for into in (then, first, then):
        assert moving.run([t.data_ptr() for t in into])
        want = [x.table.tolist() for x in launches(into)]
        assert [x.table.tolist() for x in tables] == want
    assert ran == tables * 3


def test_addresses_that_are_aligned_otherwise_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_Launch, "run", lambda _: pytest.fail("ran"))
    tables = launches(into := destinations(0, 2048))
    before = [x.table.clone() for x in tables]
    bases = [t.data_ptr() for t in into]
    assert not Moving(tables, bases).run([bases[0], bases[1] + 8])
    assert all(torch.equal(x.table, t) for x, t in zip(tables, before, strict=True))


def test_a_launch_that_fails_leaves_the_tables_where_they_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A push that heals uses them again: moved twice, they would write anywhere."""
    first, then = destinations(0, 2048), destinations(4096, 1024)
    tables = launches(first)
    moving = Moving(tables, [t.data_ptr() for t in first])
    monkeypatch.setattr(_Launch, "run", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        moving.run([t.data_ptr() for t in then])
    monkeypatch.setattr(_Launch, "run", lambda _: None)
    assert moving.run([t.data_ptr() for t in then])
    assert [x.table.tolist() for x in tables] == [x.table.tolist() for x in launches(then)]
