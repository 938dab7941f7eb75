"""What the replies of all ranks come to: one error, one report, one sum."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import msgspec

from vllm_wt_plugin.errors import PlanError, TransferError, from_dict
from vllm_wt_plugin.wire.messages import PlanReport, Reply
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.wire.patches import PatchPush, added_up, wrong_sums


def agree(replies: list[Reply], specs: Iterable[ParamSpec] = ()) -> PlanReport | None:
    """Raise the first rank's error, or what only all ranks together can know; else rank 0's report.

    A name that no rank takes (nor skips on purpose), or of which all ranks together leave a part,
    is an error.
    """
    failed = [r for r in replies if r.error is not None]
    if failed:
        error = from_dict(failed[0].error or {})
        if len(failed) > 1:
            error.where += f" (and {len(failed) - 1} more of {len(replies)} ranks)"
        raise error
    reports = [r.report for r in replies if r.report is not None]
    if not reports or len(reports) < len(replies):
        return None
    nowhere = set(reports[0].nowhere).intersection(*(r.nowhere for r in reports[1:]))
    if nowhere:
        names = sorted(nowhere)
        raise PlanError(
            f"{len(names)} names end nowhere in the served model: {', '.join(names[:20])}",
            where=names[0],
            next_step="compare the names with the served model's checkpoint",
        )
    left = [s for s in specs if _left_over(s, reports)]
    if left:
        raise PlanError(
            "larger than what the served model takes of them: "
            + ", ".join(f"{s.name} {tuple(s.shape)}" for s in left[:20]),
            where=left[0].name,
            next_step="compare shapes with the served model's checkpoint",
        )
    # What other ranks take (pipeline stages, experts) is not ignored.
    ignored = {
        n: why for n, why in reports[0].ignored.items() if all(n in r.ignored for r in reports)
    }
    return msgspec.structs.replace(reports[0], ignored=ignored)


def _left_over(spec: ParamSpec, reports: list[PlanReport]) -> bool:
    name = spec.name
    takers = [r for r in reports if name not in r.nowhere and name not in r.ignored]
    parts = [r.consumed.get(name) for r in takers]
    return (
        bool(parts)
        and all(p is not None for p in parts)
        and (sum(p or 0 for p in parts) < spec.numel)
    )


def check_patches(push: PatchPush, applied: list[Reply]) -> None:
    """Raise unless the parts of all ranks add up to what the trainer says its patches change."""
    ranks = [r.info["sums"] for r in applied]
    if wrong := set(wrong_sums(push, ranks)):
        raise not_the_trainers(wrong, "they are taken back; push dense")


def not_the_trainers(wrong: Collection[str], next_step: str) -> TransferError:
    """Of tensors whose checksums differ."""
    names = sorted(wrong)
    return TransferError(
        f"the checksum of {len(names)} tensors is not the trainer's: {', '.join(names[:20])}",
        where=names[0],
        next_step=next_step,
    )


def check_written(sums: dict[str, int], replies: list[Reply]) -> None:
    """Raise unless what every rank has written adds up to the trainer's own checksums; none:
    to those that it has told all of them."""
    agree(replies)
    sums = sums or replies[0].info["told"]
    ranks = [r.info["sums"] for r in replies]
    wrong = {n for n, have in sums.items() if added_up(ranks, n) not in (None, have)}
    wrong |= {n for r in replies for n, s in r.info["received"].items() if s != sums[n]}
    if wrong:
        raise not_the_trainers(wrong, "nothing was committed; push again")


def slowest(replies: list[Reply]) -> dict[str, float]:
    """Of each phase, the seconds of the rank that took longest."""
    out: dict[str, float] = {}
    for r in replies:
        for phase, s in r.seconds.items():
            out[phase] = max(out.get(phase, 0.0), s)
    return out
