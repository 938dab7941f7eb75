"""What the replies of all ranks say together, where nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.agreement import agree
from vllm_wt_plugin.wire.messages import PlanReport, Reply
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import Part


@dataclass(frozen=True)
class Held:
    """What the weights of one replica add up to. `ranks`: {name: parts} of each."""

    version: str
    report: PlanReport
    ranks: list[dict[str, list[Part]]]


def worst(replies: list[Reply]) -> msg.State:
    """The state of all ranks together."""
    order = ("DIRTY", "UPDATING", "IDLE")
    return min((r.state for r in replies), key=lambda s: order.index(s.phase))


def held(replies: list[Reply], specs: Iterable[ParamSpec]) -> Held:
    """The replies to `Sums`, together. Raises as `agree`."""
    agree(replies, specs)
    ranks = msgspec.convert([r.info["sums"] for r in replies], list[dict[str, list[Part]]])
    return Held(replies[0].state.version, replies[0].report or PlanReport(), ranks)
