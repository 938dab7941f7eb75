"""vLLM's own interface to an engine, driven by hand on one worker of a toy."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.test_patches import Pair, by_hand, copies
from vllm_wt_plugin.errors import RequestError, WeightSyncError


def engine_of(pair: Pair) -> Any:
    from vllm_wt_plugin.worker.engine import IPCEngine

    engine = IPCEngine.__new__(IPCEngine)  # without a vLLM around it
    engine.session, engine._session_id = pair.workers[0].session, ""
    return engine


def test_a_failed_call_ends_its_own_update_and_no_other() -> None:
    pair = Pair()
    old = copies(pair.tensors)
    engine = engine_of(pair)
    given = by_hand(pair, pair.change(), {n for n in old if n not in pair.plan.whole})
    bad = given[0].indices.expand(len(given[0].indices)).clone()
    bad[0] = 10**6
    engine.start_weight_update()
    engine.apply_patches(given[1:])
    with pytest.raises(RequestError, match="index 1000000 of"):
        engine.apply_patches([type(given[0])(given[0].name, bad, given[0].values)])
    pair.assert_serves(old, "1")
    engine.start_weight_update()
    engine.apply_patches(given)
    engine.finish_weight_update()
    changed = {g.name: pair.tensors[g.name] for g in given}
    with pytest.raises(WeightSyncError, match="no such update is open"):
        engine.apply_patches(given)
    pair.assert_serves(old | changed, "1")
