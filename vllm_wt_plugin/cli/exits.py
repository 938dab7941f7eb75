"""What the exit code of a command says."""

from __future__ import annotations

from enum import IntEnum

from vllm_wt_plugin.errors import RequestError, ServerUnreachable, StateError, WeightSyncError


class Exit(IntEnum):
    DONE = 0
    FOUND = 1  # status, verify, doctor: a problem
    USAGE = 2  # typer's own
    REFUSED = 3
    NOT_NOW = 4
    UNREACHABLE = 5
    FAILED = 6


def exit_of(error: WeightSyncError) -> Exit:
    """By who must act, as the error tree is cut."""
    match error:
        case RequestError():
            return Exit.REFUSED
        case StateError():
            return Exit.NOT_NOW
        case ServerUnreachable():
            return Exit.UNREACHABLE
    return Exit.FAILED
