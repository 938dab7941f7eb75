"""Asking several replicas at once, and telling whose fault it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from typing import Any, TypeVar

from vllm_wt_plugin.errors import NotBegun, ServerUnreachable, TransferError, WeightSyncError
from vllm_wt_plugin.trainer.client import Client

T = TypeVar("T")
GRACE_S = 5.0  # within which the others must answer once one has failed


def ask(
    pool: Executor, clients: Iterable[Client], what: Callable[[Client], T]
) -> tuple[dict[str, T], dict[str, WeightSyncError]]:
    """`what` of every replica, in parallel: answers and errors, by name. Waits for all."""
    clients = list(clients)
    if len(clients) > 1:
        futures = {c.name: pool.submit(what, c) for c in clients}
        return gather(futures, lambda: None, grace_s=None)
    try:
        return {c.name: what(c) for c in clients}, {}
    except WeightSyncError as exc:
        return {}, {clients[0].name: exc}


def answers(pool: Executor, clients: Iterable[Client], what: Callable[[Client], T]) -> dict[str, T]:
    """`ask`, in the clients' order; raises the first one's error of those that failed."""
    clients = list(clients)
    found, errors = ask(pool, clients, what)
    for c in clients:
        if c.name in errors:
            raise errors[c.name]
    return {c.name: found[c.name] for c in clients}


def gather(
    futures: Mapping[str, Future[Any]],
    failed: Callable[[], object],
    grace_s: float | None = GRACE_S,
) -> tuple[dict[str, Any], dict[str, WeightSyncError]]:
    """Results and errors by name. At an error `failed` is called, until it does not say False (the
    others go on); whoever has not answered `grace_s` later counts as unreachable. Errors of other
    kinds are raised."""
    names = {f: n for n, f in futures.items()}
    results: dict[str, Any] = {}
    errors: dict[str, WeightSyncError] = {}
    pending, deadline = set(names), None
    while pending:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        done, pending = wait(pending, left, FIRST_COMPLETED)
        if not done:
            break
        for f in done:
            exc = f.exception()
            if isinstance(exc, WeightSyncError):
                errors[names[f]] = exc
            elif exc is not None:
                failed()
                wait(pending, grace_s)  # they may read what the caller frees
                raise exc
            else:
                results[names[f]] = f.result()
        if errors and deadline is None and grace_s is not None and failed() is not False:
            deadline = time.monotonic() + grace_s
    for f in pending:
        errors[names[f]] = ServerUnreachable(
            f"no answer within {grace_s:g} s after the transfer had failed", where=names[f]
        )
    return results, errors


def culprits(errors: Mapping[str, WeightSyncError]) -> set[str]:
    """Who failed by itself: whoever does not answer; else whoever refuses. The others failed with
    a TransferError because those did."""
    lost = {n for n, e in errors.items() if isinstance(e, ServerUnreachable)}
    return lost or {n for n, e in errors.items() if not isinstance(e, TransferError)}


def overdue(error: WeightSyncError | None) -> bool:
    """Whether the replica may yet do what it was sent, with the memory that it was shown."""
    return isinstance(error, ServerUnreachable) and error.heard


def shared(
    names: Iterable[str], errors: Mapping[str, WeightSyncError], own: WeightSyncError | None
) -> dict[str, WeightSyncError]:
    """What each replica is told of a failure that all of them share; `own`: what the trainer's
    side failed with. It names the replica that is at fault, where there is one."""
    if own is not None and not isinstance(own, TransferError):
        return dict.fromkeys(names, own)
    lost = culprits(errors)
    at = "" if own is None else f"; {own}"
    out: dict[str, WeightSyncError] = {}
    for name in names:
        e = errors.get(name) or TransferError("it had taken all there was so far", where=name)
        if name in lost:
            out[name] = type(e)(e.what + at, where=e.where or name, next_step=e.next_step)
        else:
            with_ = f" with {', '.join(sorted(lost))}" if lost else ""
            out[name] = (NotBegun if isinstance(e, NotBegun) else TransferError)(
                f"the group failed{with_}: {e.what}{at}",
                where=e.where or name,
                next_step="push again: a new group is made by itself",
            )
    return out
