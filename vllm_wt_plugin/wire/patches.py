"""A push of patches as it travels: what changed, in one buffer whose layout both sides compute.

    buffer = for every word width: indices of all its tensors, then their values; then whole tensors

The request names tensors and counts; where their bytes lie follows from those alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire.buckets import ALIGN
from vllm_wt_plugin.wire.handles import Hex32, Registration
from vllm_wt_plugin.wire.params import (
    Name,
    Owner,
    ParamSpec,
    Session,
    Shape,
    Size,
    Version,
    check_specs,
    itemsize,
)

MAX_INT32 = 2**31 - 1
INDICES, VALUES = "indices/", "values/"
Checksum = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # `sparse/checksum.py`


class PatchPush(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One whole sparse update, `POST /push_patches`.

    `num_updates_list[i]` new values of `names[i]`; `whole` tensors follow in full, for modules
    that take no patches. `form` "buffer": `registration` has one tensor of bytes (see `layout`),
    `register` is sent once; "tensors": it has `INDICES + name` and `VALUES + name` for each;
    "broadcast": it is the group whose rank 0 sends that buffer, `bucket_bytes` at a time, and
    `session` is what an abort names.
    `sums[i]`: by how much the update moves `names[i]`'s checksum; `whole_sums[i]`: the checksum
    of `whole[i]`; empty: not checked.
    `base_version` None: not checked either.
    """

    names: Annotated[list[Name], msgspec.Meta(max_length=2**20)]
    dtype_names: list[str]
    shapes: list[Shape]
    num_updates_list: list[Size]
    registration: Hex32
    base_version: Version | None
    register: Registration | None = None
    whole: list[ParamSpec] = []
    sums: list[Checksum] = []
    whole_sums: list[Checksum] = []
    version: Version | None = None
    owner: Owner = ""
    update_kind: Literal["sparse_flat"] = "sparse_flat"
    form: Literal["buffer", "tensors", "broadcast"] = "buffer"
    bucket_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**40)] = 1 << 30
    session: Session = ""

    @property
    def specs(self) -> tuple[ParamSpec, ...]:
        """Of the patched tensors."""
        rows = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return tuple(ParamSpec(n, d, s) for n, d, s in rows)

    @property
    def named(self) -> tuple[object, ...]:
        """Equal for two pushes that differ in counts and values only."""
        return self.names, self.dtype_names, self.shapes, self.whole

    def check(self) -> tuple[ParamSpec, ...]:
        """Lists of one length, no name twice, no count beyond its tensor; the specs."""
        for what, rows in (("dtype_names", self.dtype_names), ("shapes", self.shapes)):
            self._check_length(what, rows)
        if not self.names and not self.whole:
            raise RequestError("`names` is empty", where="$.names")
        specs = self.specs
        check_specs((*specs, *self.whole))
        if len(self.whole_sums) not in (0, len(self.whole)):
            raise RequestError(
                f"{len(self.whole_sums)} checksums of {len(self.whole)} tensors",
                where="$.whole_sums",
            )
        self.check_counts([s.numel for s in specs])
        if self.register is not None:
            self.register.check()
        return specs

    def check_counts(self, numels: list[int]) -> None:
        """What `check` does for a push whose names are known to be right, of `numels` elements."""
        self._check_length("num_updates_list", self.num_updates_list)
        self._check_length("sums", self.sums or self.names)
        for name, count, numel in zip(self.names, self.num_updates_list, numels, strict=True):
            if count > numel:
                raise RequestError(
                    f"{count} updates of {numel} elements", where=name,
                    next_step="give each index once",
                )  # fmt: skip

    def _check_length(self, what: str, rows: Sized) -> None:
        if len(rows) != len(self.names):
            raise RequestError(
                f"`{what}` should be of the same size as `names`: "
                f"got {len(rows)} and {len(self.names)}",
                where=f"$.{what}",
            )


@dataclass(frozen=True, slots=True)
class Section:
    """Patches of one word and one index width: which of `names`, and where in the buffer."""

    members: tuple[int, ...]
    word: int  # bytes
    index: int  # bytes
    count: int
    indices_at: int
    values_at: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything lies in the buffer."""

    sections: tuple[Section, ...]
    whole_at: tuple[int, ...]
    nbytes: int


Widths = dict[tuple[int, int], list[int]]  # bytes of word and index → which of `names`


def widths(specs: tuple[ParamSpec, ...]) -> Widths:
    """The sections of a buffer, in the order of their first names."""
    out: Widths = {}
    for i, spec in enumerate(specs):
        width = itemsize(spec.dtype, spec.name), 4 if spec.numel <= MAX_INT32 else 8
        out.setdefault(width, []).append(i)
    return out


def layout(widths: Widths, counts: list[int], whole: list[ParamSpec]) -> Layout:
    """Both sides call it with what the request says."""
    sections, at = [], 0
    for (word, index), members in widths.items():
        n = sum([counts[i] for i in members])
        values_at = _up(at + n * index)
        sections.append(Section(tuple(members), word, index, n, at, values_at))
        at = _up(values_at + n * word)
    whole_at = []
    for spec in whole:
        whole_at.append(at)
        at = _up(at + spec.nbytes)
    return Layout(tuple(sections), tuple(whole_at), at)


def _up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


Part = tuple[str, Checksum]  # which elements of the tensor a rank has, and their sum


def added_up(ranks: list[dict[str, list[Part]]], name: str) -> int | Literal["differ"] | None:
    """The checksum of a tensor from its parts on all ranks; None if none has any.

    A part that several ranks hold counts once, and they must agree on it: "differ" if not.
    """
    parts: dict[str, int] = {}
    for rank in ranks:
        for key, have in rank.get(name, ()):
            if parts.setdefault(key, have) != have:
                return "differ"
    if not parts:
        return None
    return (sum(parts.values()) + 2**63) % 2**64 - 2**63


def wrong_sums(push: PatchPush, ranks: list[dict[str, list[Part]]]) -> Iterator[str]:
    """Names whose parts on all ranks do not add up to what the trainer says.

    A name that a rank holds whole was checked there and is not listed.
    """
    for name, want in zip(push.names, push.sums, strict=False):
        have = added_up(ranks, name)
        if have is not None and have != want:
            yield name
