"""An update call with patches as the push that workers prepare."""

from __future__ import annotations

import math

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.wire.handles import Registration, TensorRef
from vllm_wt_plugin.wire.patches import INDICES, MAX_INT32, VALUES, PatchPush
from vllm_wt_plugin.wire.update import UpdateInfo


def patches(info: UpdateInfo, key: str) -> PatchPush:
    """A sparse update call as a push of patches, checked; raises RequestError."""
    counts = info.num_updates_list
    if not counts:
        what = "missing" if counts is None else "empty"
        raise RequestError(
            f"`num_updates_list` is {what}", where="$.update_info.num_updates_list",
            next_step="say how many values of each name are sent",
        )  # fmt: skip
    if info.packed or info.ipc_handles is not None or info.ipc_handles_pickled is not None:
        raise RequestError(
            "patches come with plain `storages` and `handles`", where="$.update_info.packed",
            next_step="leave out packed and ipc_handles",
        )  # fmt: skip
    info.check_sizes("dtype_names", "shapes", "num_updates_list")
    if len(info.handles) != 2 * len(info.names):
        raise RequestError(
            f"`handles` should be two for each of `names`, its indices and its values: "
            f"got {len(info.handles)} for {len(info.names)}",
            where="$.update_info.handles",
        )
    refs = []
    rows = zip(info.names, info.dtype_names, info.shapes, counts, strict=True)
    for i, (name, dtype, shape, n) in enumerate(rows):
        index = "int32" if math.prod(shape) <= MAX_INT32 else "int64"
        refs.append(TensorRef(INDICES + name, index, (n,), *info.handles[2 * i]))
        refs.append(TensorRef(VALUES + name, dtype, (n,), *info.handles[2 * i + 1]))
    push = PatchPush(
        info.names, info.dtype_names, info.shapes, counts, key, info.base_version,
        Registration(key, tuple(info.storages), tuple(refs)), sums=info.sums, form="tensors",
    )  # fmt: skip
    push.check()
    return push
