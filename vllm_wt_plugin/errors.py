"""Every error of the package, split by who must act.

    WeightSyncError
    ├── RequestError            the caller sent something that cannot be done
    │   ├── PlanError           names, shapes or dtypes do not fit the engine's model
    │   ├── HandleError         a tensor handle is malformed, gone or too small
    │   └── AccessDenied        no right to change weights
    ├── StateError              right request, wrong moment
    │   ├── UpdateInProgress    another update is open
    │   ├── NoUpdate            no update is open, or not this one
    │   ├── EngineAsleep        the weights are offloaded
    │   ├── EngineDirty         a failed update left mixed weights; push a complete dense update
    │   ├── UnknownRegistration the worker does not hold these handles; send them again
    │   └── VersionMismatch     a delta does not start from the version the worker holds
    ├── TransferError           moving or loading the bytes failed
    │   ├── NotJoined           ranks of a group did not come to its rendezvous
    │   └── NotBegun            an update was called off before it began; it wrote nothing
    ├── ServerUnreachable       the server did not answer, or not as this plugin does
    └── UnsupportedVLLM         this vLLM, or this configuration of it, is not supported

Errors cross process borders as data (`to_dict` / `from_dict`), never as pickles.
"""

from __future__ import annotations

from typing import Any, ClassVar


class WeightSyncError(Exception):
    """Base. `what` went wrong, `where` (parameter, rank, version), `next_step` to take."""

    status: ClassVar[int] = 500
    rolled_back: bool = False  # server side: the update had begun to write, and was undone
    report: Any = None  # trainer side: the PushReport of a push that failed

    def __init__(self, what: str, *, where: str = "", next_step: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.next_step = what, where, next_step

    def __str__(self) -> str:
        where = f" [{self.where}]" if self.where else ""
        step = f" Next: {self.next_step}" if self.next_step else ""
        return f"{self.what}{where}{step}"

    def to_dict(self) -> dict[str, str]:
        return {
            "code": type(self).__name__,
            "error": self.what,
            "where": self.where,
            "next_step": self.next_step,
        }


class RequestError(WeightSyncError):
    status = 400


class PlanError(RequestError):
    status = 422


class HandleError(RequestError):
    pass


class AccessDenied(RequestError):
    status = 403


class StateError(WeightSyncError):
    status = 409


class UpdateInProgress(StateError):
    pass


class NoUpdate(StateError):
    pass


class EngineAsleep(StateError):
    pass


class EngineDirty(StateError):
    status = 503


class UnknownRegistration(StateError):
    pass


class VersionMismatch(StateError):
    pass


class TransferError(WeightSyncError):
    pass


class NotJoined(TransferError):
    ranks: tuple[int, ...] = ()  # where it is known


class NotBegun(TransferError):
    pass


class ServerUnreachable(WeightSyncError):
    status = 502
    heard = False  # it was sent the request, and may yet do what it says


class UnsupportedVLLM(WeightSyncError):
    status = 501


def _tree(cls: type[WeightSyncError]) -> dict[str, type[WeightSyncError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _tree(sub)
    return found


BY_CODE: dict[str, type[WeightSyncError]] = _tree(WeightSyncError)


def from_dict(data: dict[str, Any]) -> WeightSyncError:
    """The error a peer sent; an unknown code becomes a plain `WeightSyncError`."""
    cls = BY_CODE.get(str(data.get("code", "")), WeightSyncError)
    return cls(
        str(data.get("error", "unknown error")),
        where=str(data.get("where", "")),
        next_step=str(data.get("next_step", "")),
    )
