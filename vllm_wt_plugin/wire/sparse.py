"""An update call with patches as the push that workers prepare."""

from __future__ import annotations

import math

import msgspec

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire.handles import Registration, TensorRef
from vllm_wt_plugin.wire.patches import INDICES, MAX_INT32, VALUES, PatchPush
from vllm_wt_plugin.wire.update import UpdateInfo

Part = tuple[str, str, int]  # name, dtype and elements of one tensor of a push


def patches(info: UpdateInfo, key: str) -> PatchPush:
    """A sparse update call that hands over its tensors, as a push; raises RequestError."""
    push = _push(info, key)
    if info.packed or info.ipc_handles is not None or info.ipc_handles_pickled is not None:
        raise RequestError(
            "patches come with plain `storages` and `handles`", where="$.update_info.packed",
            next_step="leave out packed and ipc_handles",
        )  # fmt: skip
    if len(info.handles) != 2 * len(info.names):
        raise RequestError(
            f"`handles` should be two for each of `names`, its indices and its values: "
            f"got {len(info.handles)} for {len(info.names)}",
            where="$.update_info.handles",
        )
    refs = [
        TensorRef(name, dtype, (n,), *handle)
        for (name, dtype, n), handle in zip(parts(push), info.handles, strict=True)
    ]
    registration = Registration(key, tuple(info.storages), tuple(refs))
    push = msgspec.structs.replace(push, register=registration)
    push.check()
    return push


def named(info: UpdateInfo, key: str) -> PatchPush:
    """One that only names what its trainer broadcasts; raises RequestError."""
    push = _push(info, key)
    if info.packed:
        raise RequestError(
            "patches are not packed", where="$.update_info.packed", next_step="leave out packed"
        )
    push.check()
    return push


def parts(push: PatchPush, *, narrow: bool = False) -> list[Part]:
    """The tensors of a push in the order in which they come: indices and values, name by name.
    `narrow`: indices of all are int32."""
    out: list[Part] = []
    rows = zip(push.names, push.dtype_names, push.shapes, push.num_updates_list, strict=True)
    for name, dtype, shape, n in rows:
        index = "int32" if narrow or math.prod(shape) <= MAX_INT32 else "int64"
        out += [(INDICES + name, index, n), (VALUES + name, dtype, n)]
    return out


def _push(info: UpdateInfo, key: str) -> PatchPush:
    counts = info.num_updates_list
    if not counts:
        what = "missing" if counts is None else "empty"
        raise RequestError(
            f"`num_updates_list` is {what}", where="$.update_info.num_updates_list",
            next_step="say how many values of each name are sent",
        )  # fmt: skip
    info.check_sizes("dtype_names", "shapes", "num_updates_list")
    return PatchPush(
        info.names, info.dtype_names, info.shapes, counts, key, info.base_version,
        sums=info.sums, form="tensors",
    )  # fmt: skip
