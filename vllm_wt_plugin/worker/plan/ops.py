"""What a dispatched operation reads, writes and aliases, by its schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def storage_key(t: torch.Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def is_view(func: Any) -> bool:
    """Operations whose result shares its input's storage, and that write nothing."""
    returns = func._schema.returns
    return bool(returns) and all(
        r.alias_info is not None and not r.alias_info.is_write for r in returns
    )


def written_by(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for i, a in enumerate(func._schema.arguments):
        if a.alias_info is not None and a.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(a.name)
            yield from tensors_of(value)


def tensors_of(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_of(item)
    elif isinstance(tree, dict):
        yield from tensors_of(list(tree.values()))
