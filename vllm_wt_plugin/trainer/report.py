"""What a push did, as data and as one line."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_wt_plugin.errors import WeightSyncError
from vllm_wt_plugin.wire.messages import PlanReport


@dataclass(frozen=True, kw_only=True)
class ReplicaOutcome:
    """One replica's part. `plan` is what its first push with these tensors reported."""

    name: str
    version: str = ""
    seconds: dict[str, float] = field(default_factory=dict)  # its own, by phase
    plan: PlanReport | None = None
    error: WeightSyncError | None = None


@dataclass(frozen=True)
class VerifyReport:
    """What `WeightSync.verify` found, by replica: tensors that differ from the trainer's, and those
    that vLLM keeps in another form, which no checksum reaches."""

    differ: dict[str, list[str]]
    unseen: dict[str, list[str]]

    @property
    def ok(self) -> bool:
        return not any(self.differ.values())


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """One push to all replicas. `seconds`: `list`, then `export` and `stage` or `diff` and `pack`,
    `request`, and `total`."""

    version: str
    tensors: int
    bytes: int
    seconds: dict[str, float]
    replicas: tuple[ReplicaOutcome, ...]
    changed: float | None = None  # the share of elements that a sparse push found changed

    @property
    def ok(self) -> bool:
        return all(r.error is None for r in self.replicas)

    def __str__(self) -> str:
        total = self.seconds["total"]
        good = sum(r.error is None for r in self.replicas)
        line = (
            f"version {self.version}: {self.tensors} tensors, {_size(self.bytes)} "
            f"in {total * 1e3:.1f} ms to {good} of {len(self.replicas)} replicas"
        )
        if self.changed is not None:
            line += f"; {self.changed:.3%} of the elements changed"
        phases = dict(self.seconds)
        for r in self.replicas[:1]:
            phases |= r.seconds
            if r.plan is not None:
                line += (
                    f"; {r.plan.in_place} modules in place, {len(r.plan.processed)} processed, "
                    f"{len(r.plan.opaque)} by vLLM's loader"
                )
                line += f", {len(r.plan.ignored)} names ignored" if r.plan.ignored else ""
                line += f", {len(r.plan.kept)} buffers not sent" if r.plan.kept else ""
        named = [f"{k} {v * 1e3:.1f}" for k, v in phases.items() if k != "total" and v >= 5e-5]
        line += f" [{', '.join(named)}]" if named else ""
        return line + "".join(f"; {r.name} FAILED: {r.error}" for r in self.replicas if r.error)


def _size(n: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n} B"
