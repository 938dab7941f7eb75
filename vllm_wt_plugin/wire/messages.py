"""What travels: HTTP bodies, the verbs a worker runs, and its replies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from vllm_wt_plugin.errors import EngineDirty, HandleError, RequestError, UpdateInProgress
from vllm_wt_plugin.wire import decoding
from vllm_wt_plugin.wire.buckets import Geometry
from vllm_wt_plugin.wire.handles import Hex32, Registration, ShmStorage
from vllm_wt_plugin.wire.nccl import (
    Forms,
    Joined,
    Leave,
    Progress,
    Receive,
    ReceiveNamed,
    ReceivePatches,
    Verify,
    Written,
)
from vllm_wt_plugin.wire.params import Name, Owner, ParamSpec, Session, Text, Version
from vllm_wt_plugin.wire.patches import Checksum, PatchPush
from vllm_wt_plugin.wire.update import UpdateInfo

decode, convert = decoding.decode, decoding.convert
PROTOCOL = 1
BY_GROUP = ("nccl", "sparse_nccl")  # backends whose clients only name what they broadcast
BACKENDS = ("ipc", *BY_GROUP)
LEASE_S = 60.0  # an update whose trainer is silent for so long is ended

Lease = Annotated[float, msgspec.Meta(gt=0, le=3600)]
Specs = Annotated[tuple[ParamSpec, ...], msgspec.Meta(max_length=2**20)]


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


# ---- HTTP bodies --------------------------------------------------------------------------


class PushRequest(_Data, frozen=True):
    """One whole update. `register` is sent once; later pushes name `registration` alone."""

    registration: Hex32
    register: Registration | None = None
    version: Version | None = None
    owner: Owner = ""  # who pushes, for the refusals other trainers get
    update_kind: Literal["dense"] = "dense"
    replaces: Hex32 | None = None  # an earlier registration, whose memory the trainer will free


class IpcInit(_Data, frozen=True):
    """`/init_weight_transfer_engine` for ipc: vLLM's `packed`, and ours."""

    packed: bool = False
    protocol: Annotated[int, msgspec.Meta(ge=1, le=PROTOCOL)] = PROTOCOL


class InitBody(_Data, frozen=True):
    init_info: dict[str, Any] = {}


class Announcement(_Data, frozen=True):
    """A packed trainer's tensors, and the buffers they will come through (`wire/buckets.py`).

    `ranks` trainer ranks fill buffers of their own with the same bytes; `buffers` has one rank's
    after another's, and a worker reads from one rank's. No `buffers`: they are broadcast.
    """

    id: Hex32
    specs: Annotated[tuple[ParamSpec, ...], msgspec.Meta(min_length=1, max_length=2**20)]
    buffer_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)]
    buffers: Annotated[tuple[Registration, ...], msgspec.Meta(max_length=2**13)] = ()
    geometry: Geometry = "rows"
    ranks: Annotated[int, msgspec.Meta(ge=1, le=2**10)] = 1


class StartBody(_Data, frozen=True):
    """`session`: its name, if the trainer wants to know it before the answer comes."""

    owner: Owner = ""
    lease_s: Lease = LEASE_S
    is_checkpoint_format: bool = True
    announced: Hex32 | None = None  # a packed update; `announce` is sent once
    announce: Announcement | None = None
    group: Hex32 | None = None  # of an announced update that is broadcast
    verify: Verify = "off"  # which of its checksums `finish` will bring (`wire/nccl.py`)
    round: Annotated[int, msgspec.Meta(ge=0, le=2**60)] = 0
    attached: Session | None = None  # a bridge writes in place, nothing is sent; "": the last one
    session: Session = ""

    def __post_init__(self) -> None:
        if not self.is_checkpoint_format:  # msgspec makes a refusal with the path of it
            raise ValueError(
                "is_checkpoint_format must be true: tensors are named and shaped as in a checkpoint"
            )


class UpdateBody(_Data, frozen=True):
    """`session`, here and below: what `start` answered, so that a trainer whose lease has ended
    does not write into another's update. vLLM's own clients leave it out."""

    update_info: UpdateInfo | list[UpdateInfo]  # a list: one for each worker, by global rank
    session: Session = ""

    @property
    def infos(self) -> list[UpdateInfo]:
        return self.update_info if isinstance(self.update_info, list) else [self.update_info]


class FinishBody(_Data, frozen=True):
    """`sums`: the trainer's own checksums, compared with the workers' before they commit."""

    weight_version: Version | None = None
    session: Session = ""
    sums: Annotated[dict[Name, Checksum], msgspec.Meta(max_length=2**20)] = {}
    told: bool = False  # they came through the group


class BroadcastPush(_Data, frozen=True):
    """`POST /push_broadcast`: all of an update the replica knows. `forms`: see `wire/nccl.py`."""

    start: StartBody
    version: Version | None = None
    forms: Forms = ()

    def check(self) -> None:
        s = self.start
        if not (s.session and s.announced and s.group) or s.announce or s.attached is not None:
            raise RequestError(
                "it takes `session`, `announced` and `group`, and no `announce` or `attached`",
                where="$.start",
                next_step="start_weight_update announces",
            )

    @property
    def session(self) -> str:
        return self.start.session

    @property
    def finish(self) -> FinishBody:
        """The last of its three steps."""
        return FinishBody(self.version, self.session, told=bool(self.forms))


class AbortBody(_Data, frozen=True):
    reason: Text = "aborted by request"
    session: Session = ""


class NamesBody(_Data, frozen=True):
    names: Annotated[list[Name], msgspec.Meta(max_length=2**20)] = []  # empty: all
    specs: Specs = ()  # whose plan to go by; empty: that of the last update


class VersionBody(_Data, frozen=True):
    new_version: Version


Push = PushRequest | PatchPush | BroadcastPush  # a whole update in one request


# ---- verbs: API server (or LLM object) → every worker --------------------------------------


class _Verb(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="verb"):
    pass


class Status(_Verb, frozen=True, tag="status"):
    """Read the state and `memory`; end an expired update; raise if that of `whole` lacks parts."""

    memory: bool = False
    whole: Session | None = None


class Init(_Verb, frozen=True, tag="init"):
    """Check a trainer's protocol; for a group, begin to join it."""

    info: dict[str, Any]


class Begin(_Verb, frozen=True, tag="begin"):
    session: Session
    owner: str
    lease_s: float
    resume_after: bool  # the API side paused the engine for this update


class Prepare(_Verb, frozen=True, tag="prepare"):
    """Check everything about an update; write nothing."""

    session: Session
    registration: Hex32
    register: Registration | None
    complete: bool  # every parameter of the model must be covered by this one
    replaces: Hex32 | None = None  # closed when this one is open


class PreparePart(_Verb, frozen=True, tag="prepare_part"):
    """As `prepare`, for a part of an update. `parts`: one for all ranks or one for each, by GPU."""

    session: Session
    registration: Hex32
    parts: tuple[dict[str, Registration], ...]

    def own(self, rank: int, gpu: str) -> Registration:
        """What the worker of this rank on this GPU shall open. Raises HandleError."""
        part = self.parts[rank if len(self.parts) > 1 else 0]
        own = part.get("") or part.get(gpu)
        if own is None:
            raise HandleError(
                f"IPC handle not found for GPU UUID {gpu or '(this worker has no GPU)'}. "
                f"Available UUIDs: {list(part)}",
                next_step="run a trainer rank on the GPU of every worker, or push with WeightSync, "
                "which reaches other GPUs and, without one, shared memory",
            )
        return own


class PreparePatches(_Verb, frozen=True, tag="prepare_patches"):
    """Check patches that came, write nothing. `pauses`: the engine, next, until the update ends."""

    session: Session
    push: PatchPush
    pauses: bool = False


class Sums(_Verb, frozen=True, tag="sums"):
    """Checksums of what this rank holds of a plan's names, and the plan's report; reads only."""

    names: list[str] = []  # empty: all
    specs: tuple[ParamSpec, ...] = ()  # empty: those of the last update


class Announce(_Verb, frozen=True, tag="announce"):
    """Check a packed update before its first bucket; write nothing."""

    session: Session
    announced: Hex32
    announce: Announcement | None
    group: Hex32 | None = None
    verify: Verify = "off"
    round: int = 0


class Bucket(_Verb, frozen=True, tag="bucket"):
    """Copy one bucket of the announced update out of its buffer."""

    session: Session
    index: int


class Export(_Verb, frozen=True, tag="export"):
    """Show a trainer on this host where these checkpoint tensors (default: those of the served
    checkpoint) live, to be written in place.

    `presence`: a segment the trainer holds for as long as it is attached.
    """

    attached: Hex32
    specs: tuple[ParamSpec, ...] | None
    owner: str
    presence: ShmStorage | None


class Detach(_Verb, frozen=True, tag="detach"):
    attached: Session


class Touch(_Verb, frozen=True, tag="touch"):
    """From now until commit the attached trainer may be writing."""

    session: Session
    attached: Session


class Apply(_Verb, frozen=True, tag="apply"):
    """Copy the prepared registration into the live weights."""

    session: Session


class Commit(_Verb, frozen=True, tag="commit"):
    session: Session
    version: str | None


class Abort(_Verb, frozen=True, tag="abort"):
    session: Session
    reason: str
    early: bool = False  # it may come before the update: that shall not begin then


class EndTurn(_Verb, frozen=True, tag="end_turn"):
    """All that this update's process had to do is done: others may begin."""

    session: Session


class MarkDirty(_Verb, frozen=True, tag="mark_dirty"):
    reason: str
    resume_after: bool = False  # the update that heals it shall resume the engine


class SetVersion(_Verb, frozen=True, tag="set_version"):
    version: str


class Shutdown(_Verb, frozen=True, tag="shutdown"):
    """Forget registrations and close every mapping."""


Verb = (
    Status | Init | Joined | Leave | Begin | Prepare | PreparePart | PreparePatches | Sums
    | Announce | Receive | ReceiveNamed | ReceivePatches | Progress | Written | Bucket | Apply
    | Commit | Abort | EndTurn | MarkDirty | SetVersion | Shutdown | Export | Detach | Touch
)  # fmt: skip

_verbs = msgspec.msgpack.Decoder(list[Verb])


def encode_verbs(*verbs: Verb) -> bytes:
    return msgspec.msgpack.encode(verbs)


def decode_verbs(payload: object) -> list[Verb]:
    """Verbs come as bytes only: JSON callers (dev mode's /collective_rpc) cannot make them."""
    if not isinstance(payload, bytes):
        raise RequestError(
            "weight sync verbs are internal", next_step="use the routes, e.g. POST /push_weights"
        )
    return decode(_verbs, payload)


# ---- replies ------------------------------------------------------------------------------


class State(_Data, frozen=True):
    """A worker's update session. `since` is a Unix time in seconds."""

    phase: Literal["IDLE", "UPDATING", "DIRTY"]
    version: str
    reason: str = ""
    owner: str = ""
    session: str = ""
    since: float = 0.0
    lease_left_s: float = 0.0
    resume_after: bool = False
    wrote: bool = False
    asleep: tuple[str, ...] = ()

    def check_resumable(self) -> None:
        """Raise unless the weights are whole and no open update is about to mix them."""
        if self.phase == "DIRTY" or self.wrote:
            raise EngineDirty(
                "resume is refused: the weights are DIRTY: "
                f"{self.reason or 'an update is half done'}",
                next_step="push a complete dense update (POST /push_weights)",
            )
        if self.phase == "UPDATING":
            raise UpdateInProgress(
                f"resume is refused: an update of {self.owner or 'an unnamed trainer'} is open",
                next_step="finish it, or POST /abort_weight_update",
            )


class PlanReport(_Data, frozen=True):
    """What an update does on one rank; names are checkpoint names."""

    tensors: int = 0
    bytes: int = 0
    segments: int = 0
    in_place: int = 0  # modules
    processed: dict[str, str] = {}  # module → why
    opaque: dict[str, str] = {}
    ignored: dict[str, str] = {}  # name → why
    nowhere: list[str] = []
    derived: list[str] = []  # live tensors that processing made
    kept: list[str] = []  # live buffers of the engine's own checkpoint that no name brings
    consumed: dict[str, int] = {}  # elements of each name this rank takes, where not all
    stored: dict[str, str] = {}  # name → the dtype the engine holds, where it is another
    shadowed: bool = False  # the engine keeps host copies: `whole` takes patches after all
    whole: dict[str, str] = {}  # name that takes no patches → those of one value go together
    elements: int = 0  # of all tensors, as the trainer has them


class Reply(_Data, frozen=True):
    """One rank's answer. `error` is `WeightSyncError.to_dict()`."""

    rank: int
    state: State
    error: dict[str, str] | None = None
    report: PlanReport | None = None
    seconds: dict[str, float] = {}
    info: dict[str, Any] = {}
