"""What a trainer and its workers agree on for a broadcast: where to meet, what is checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire.buckets import Bucket, size
from vllm_wt_plugin.wire.handles import Hex32
from vllm_wt_plugin.wire.params import ParamSpec, Session, Text
from vllm_wt_plugin.wire.patches import PatchPush

TIMEOUT_S, RENDEZVOUS_S = 300.0, 60.0
SAMPLE = 16  # of so many tensors one is checked, another one in each push
SUM_BYTES, FORMS = 8, 4  # of a checksum; how many forms of them one update may bring

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Verify = Literal["off", "sample", "full"]
PackedBytes = Annotated[int, msgspec.Meta(ge=1, le=2**40)]  # of one buffer
PackedBuffers = Annotated[int, msgspec.Meta(ge=1, le=8)]
Forms = Annotated[tuple[Text, ...], msgspec.Meta(max_length=FORMS)]


class NcclInit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`init_info` of `/init_weight_transfer_engine` for a group: vLLM's fields, and ours.

    Ours (`communicator: "torch"`) names the random `group` that meets at the address; `timeout_s`
    bounds one transfer, `rendezvous_s` the meeting. A worker's rank is `rank_offset` and its own
    rank over all data-parallel engines.
    """

    rank_offset: Annotated[int, msgspec.Meta(ge=0, le=2**20)]
    world_size: Annotated[int, msgspec.Meta(ge=2, le=2**20)]
    master_address: Text | None = None
    master_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    nccl_unique_id_b64: Text | None = None
    packed: bool = False
    packed_buffer_size_bytes: PackedBytes = 1 << 30
    packed_num_buffers: PackedBuffers = 2
    communicator: Literal["pynccl", "torch"] = "pynccl"
    protocol: int = 1
    group: Hex32 | None = None
    timeout_s: Seconds = TIMEOUT_S
    rendezvous_s: Seconds = RENDEZVOUS_S

    def check(self, rank: int) -> int:
        """The group rank of a worker; raises RequestError if the payload makes no sense for it."""
        met = self.master_address is not None and self.master_port is not None
        if self.communicator == "torch" and not (met and self.group):
            raise RequestError(
                "this communicator needs `master_address`, `master_port` and `group`",
                where="$.init_info",
            )
        if self.communicator == "pynccl" and met == (self.nccl_unique_id_b64 is not None):
            raise RequestError(
                "give either `nccl_unique_id_b64`, or `master_address` and `master_port`",
                where="$.init_info",
            )
        if not 1 <= self.rank_offset + rank < self.world_size:
            raise RequestError(
                f"this worker would be rank {self.rank_offset + rank} of a group of "
                f"{self.world_size} in which rank 0 sends",
                where="$.init_info.world_size",
                next_step="world_size is rank_offset + the workers of all engines "
                "(GET /get_world_size)",
            )
        return self.rank_offset + rank


def checked(specs: Sequence[ParamSpec], verify: Verify, round_: int) -> list[str]:
    """The names whose checksums are compared before commit: both sides compute them.

    "sample": every sixteenth tensor in their order, so some of each bucket; sixteen pushes
    (`round_`) check them all.
    """
    if verify == "off":
        return []
    step = SAMPLE if verify == "sample" else 1
    return [s.name for s in specs[round_ % step :: step]] or [s.name for s in specs[:1]]


def buffer_nbytes(buckets: Sequence[Bucket]) -> int:
    """Of each buffer, on either side: what the largest bucket takes, or all checksums in as many
    forms as there may be."""
    names = {p.spec.name for b in buckets for p in b}
    sums = SUM_BYTES * len(names) * FORMS
    return max([sums, 1, *map(size, buckets)])


# ---- verbs (`wire/messages.py` has the others) ----------------------------------------------


class _Verb(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="verb"):
    pass


class Joined(_Verb, frozen=True, tag="joined"):
    """Wait a moment for the group; `info["joining"]` says whether that goes on."""


class Leave(_Verb, frozen=True, tag="leave"):
    """End the group that was joined or is being joined. Refused while an update is open."""


class Receive(_Verb, frozen=True, tag="receive"):
    """Begin to take the announced buckets from the group; `Progress` goes on with it.

    `together`: not before every rank of the group has begun. Behind the last bucket come then the
    trainer's own checksums of the checked names, an int64 for each of `forms`: the dtypes, of all
    replicas, that they end in ("": the one they have)."""

    session: Session
    together: bool = False
    forms: Forms = ()


class ReceiveNamed(_Verb, frozen=True, tag="receive_named"):
    """`Announce` and `Receive` in one, in vLLM's words: all tensors of the model, through the
    group that was joined, in the geometry that its init said. None named: those of last time."""

    session: Session
    specs: tuple[ParamSpec, ...]
    packed: bool = False  # where init did not say so
    buffer_bytes: PackedBytes | None = None  # None: as init said


class ReceivePatches(_Verb, frozen=True, tag="receive_patches"):
    """Check what can be known of `push`, and begin to take its buffer, or the indices and values
    of each name, from the group; once all are here, `PreparePatches` of the same push finds them.

    `narrow`: indices are int32 for tensors of any size, as vLLM's own trainer sends them."""

    session: Session
    push: PatchPush
    narrow: bool = False


class Progress(_Verb, frozen=True, tag="progress"):
    """Copy what has arrived, wait a moment for more; `info["receiving"]`: there is more to come."""

    session: Session


class Written(_Verb, frozen=True, tag="written"):
    """Checksums of what the open update has written, for these names; none: for those whose
    checksums the trainer has broadcast, which are then `info["told"]`."""

    session: Session
    names: list[str]
