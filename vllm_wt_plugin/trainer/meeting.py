"""A trainer's group with its replicas: who is in it, and how they come together."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch

from vllm_wt_plugin.errors import (
    NotJoined,
    RequestError,
    ServerUnreachable,
    TransferError,
    WeightSyncError,
)
from vllm_wt_plugin.trainer.client import Client
from vllm_wt_plugin.trainer.replicas import ask, gather
from vllm_wt_plugin.transport.backends import Member
from vllm_wt_plugin.transport.group import Group, Joining, join, listen
from vllm_wt_plugin.wire.nccl import RENDEZVOUS_S, TIMEOUT_S, NcclInit, Verify

OWN = ""  # the trainer's key beside replicas' names


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """How trainer and replicas meet, what they check, and how long they wait for one another.

    `host`, `port`: an address of this machine that every replica reaches; 0: any free port.
    `timeout_s`: of one transfer; `rendezvous_s`: of the meeting before the first.
    `buffer_bytes`: of each of two buffers, here and on every worker. `packed=False`: a broadcast
    for each tensor, however large.
    `verify`: which checksums are compared before a commit; None: "full" in the first push of a
    group, "sample" after it (`wire/nccl.py`).
    `on_replica_error`: "drop" goes on without a replica that fails, in later pushes too; "raise"
    fails. `sender`: this process sends (None: rank 0 of torch's default group does); the others
    only walk the source, so that its gathers line up.
    """

    host: str = "127.0.0.1"
    port: int = 0
    timeout_s: float = TIMEOUT_S
    rendezvous_s: float = RENDEZVOUS_S
    buffer_bytes: int = 384 << 20
    packed: bool = True
    verify: Verify | None = None
    on_replica_error: Literal["raise", "drop"] = "raise"
    sender: bool | None = None

    @property
    def sends(self) -> bool:
        dist = torch.distributed
        if self.sender is None and dist.is_available() and dist.is_initialized():
            return dist.get_rank() == 0
        return self.sender is not False


@dataclass
class Meeting:
    """A group that met. `ranks`: of each replica's workers."""

    id: str
    ranks: dict[str, range]
    device: torch.device  # of the buffers
    group: Group
    pushes: int = 0  # that went well

    def of(self, clients: list[Client]) -> bool:
        """Whether it is whole, and of these replicas alone."""
        return list(self.ranks) == [c.name for c in clients] and not self.group.aborted


class CouldNotMeet(Exception):
    """`errors` by replica, `own`: the trainer's."""

    def __init__(self, errors: dict[str, WeightSyncError], own: WeightSyncError | None) -> None:
        super().__init__("the replicas did not meet")
        self.errors, self.own = errors, own


def meet(
    pool: Executor, clients: list[Client], options: GroupOptions, source: torch.device
) -> Meeting:
    """Have every worker of every replica join a new group; this process is rank 0.

    Blocking, at most `rendezvous_s` and what a replica takes to answer. Raises CouldNotMeet, or
    RequestError for an address that cannot be had.
    """
    status, errors = ask(pool, clients, lambda c: c.status())
    if errors:
        raise CouldNotMeet(errors, None)
    ranks: dict[str, range] = {}
    n = 1
    for c in clients:  # in their order, not that of their answers
        ranks[c.name] = range(n, n + status[c.name]["world_size"])
        n = ranks[c.name].stop
    device = _device({s["device"] for s in status.values()}, source)
    store = listen(options.host, options.port)
    at = Member(
        host=options.host, port=store.port, group=secrets.token_hex(16), rank=0, world_size=n
    )
    joining = Joining(lambda stop: join(at, device, options.rendezvous_s, stop, store))
    futures: dict[str, Any] = {
        c.name: pool.submit(c.join, _init(at, ranks[c.name], options)) for c in clients
    }
    done, errors = gather({OWN: joining.future} | futures, joining.abort)
    if not errors:
        return Meeting(at.group, ranks, device, done[OWN])
    own = errors.pop(OWN, None)
    if isinstance(own, NotJoined):
        for name, theirs in ranks.items():
            if away := set(theirs) & set(own.ranks):
                why = errors[name].what if name in errors else "its workers did not join"
                errors[name] = ServerUnreachable(f"{why} (ranks {sorted(away)})", where=name)
    raise CouldNotMeet(errors, own)


def _init(at: Member, ranks: range, options: GroupOptions) -> dict[str, Any]:
    init = NcclInit(
        ranks.start, at.world_size, at.host, at.port, communicator="torch", group=at.group,
        timeout_s=options.timeout_s, rendezvous_s=options.rendezvous_s,
    )  # fmt: skip
    data: dict[str, Any] = msgspec.to_builtins(init)
    return {k: v for k, v in data.items() if v is not None}


def _device(kinds: Iterable[str], source: torch.device) -> torch.device:
    """Where buffers lie: on a GPU for engines on GPUs, the source's own if it is on one."""
    kind = set(kinds)
    if len(kind) > 1:
        raise RequestError(
            f"replicas on {' and '.join(sorted(kind))} cannot be in one group",
            next_step="make a WeightSync for each kind",
        )
    if kind == {"cpu"}:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise TransferError(
            "the replicas are on GPUs, this trainer has none",
            next_step="run the trainer on a GPU, or push over ipc",
        )
    return source if source.type == "cuda" else torch.device("cuda", torch.cuda.current_device())
