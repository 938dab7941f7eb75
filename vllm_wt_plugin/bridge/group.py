"""Process groups of the bridge's own, beside a trainer's default one, and data through them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    ProcessGroup,
    Store,
    _new_process_group_helper,
    _world,
)
from torch.distributed.rendezvous import rendezvous

from vllm_wt_plugin.errors import RequestError, TransferError

MAX_BYTES = 1 << 30  # of one broadcast list


def init_process_group(
    backend: str | None = None,
    init_method: str | None = None,
    timeout: timedelta | None = None,
    world_size: int = -1,
    rank: int = -1,
    store: Store | None = None,
    group_name: str = "",
    pg_options: Any = None,
) -> ProcessGroup:
    """A named group that needs no default group and disturbs none. Collective.

    Either `store` (with `world_size` and `rank`) or `init_method` (default `env://`). End it
    with `torch.distributed.destroy_process_group(group)`.
    """
    wait = timedelta(seconds=300) if timeout is None else timeout
    if store is not None and (init_method is not None or world_size <= 0 or rank < 0):
        raise RequestError("a store comes with world_size and rank, and without init_method")
    if store is None:
        method = "env://" if init_method is None else init_method
        store, rank, world_size = next(rendezvous(method, rank, world_size, timeout=wait))
        store.set_timeout(wait)
        store = PrefixStore(group_name, store)
    make: Any = _new_process_group_helper
    # The same calls that torch's own `init_process_group` makes, less those for the default group.
    group, _ = make(
        world_size, rank, [], dist.Backend(backend or "undefined"), store,
        group_name=group_name, backend_options=pg_options, timeout=wait,
    )  # fmt: skip
    if not isinstance(group, ProcessGroup):
        raise TransferError("this process is not in the group", where=group_name)
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def broadcast_object_list(
    object_list: list[Any], src: int, group: ProcessGroup, device: torch.device | None = None
) -> None:
    """Replace every rank's `object_list` by `src`'s, in place. Collective.

    The objects are data: None, numbers, strings, bytes, lists, dicts. No pickle: RequestError on
    `src` for anything else, and the other ranks fail with it.
    """
    at = device or torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    data, error = b"", None
    if group.rank() == src:  # not `get_rank`, which asks for a default group
        try:
            data = msgspec.msgpack.encode(_plain(object_list))
        except TypeError as exc:
            error = RequestError(f"only data can be broadcast: {exc}")
    size = torch.tensor([-1 if error else len(data)], dtype=torch.int64, device=at)
    dist.broadcast(size, src, group)
    nbytes = int(size.item())
    if error is not None:
        raise error
    if not 0 <= nbytes <= MAX_BYTES:
        raise TransferError(
            f"rank {src} has no list to send, or one of more than {MAX_BYTES} bytes"
        )
    buffer = torch.empty(nbytes, dtype=torch.uint8, device=at)
    if data:
        buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(buffer, src, group)
    object_list[:] = msgspec.msgpack.decode(bytes(buffer.cpu().numpy()), type=list[Any])


_PLAIN = (type(None), bool, int, float, str, bytes)


def _plain(value: Any) -> Any:
    """`value` if it arrives as it was sent; TypeError otherwise (msgpack makes tuples lists)."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    if type(value) not in _PLAIN:
        raise TypeError(f"{type(value).__name__} is not one of None, bool, int, float, str, bytes, "
                        "list, dict")  # fmt: skip
    return value
