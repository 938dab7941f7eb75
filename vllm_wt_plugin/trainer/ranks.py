"""Trainer ranks that push one sharded source together: they stay in step, or fail as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import msgspec
import torch

from vllm_wt_plugin.errors import TransferError, WeightSyncError, from_dict
from vllm_wt_plugin.wire import exchange


class Ranks:
    """Several ranks, or this process alone; rank 0 leads.

    Making one is collective, and so is every method: all ranks call it, in the same order, and
    block until all have. They meet in a gloo group of their own, which carries bytes of JSON and
    never objects; a rank that is away for `timeout_s` is an error on all others.
    """

    def __init__(self, rank: int, size: int, group: Any) -> None:
        self.rank, self.size, self._group = rank, size, group

    @classmethod
    def of_default_group(cls, timeout_s: float) -> Ranks:
        """Every rank of torch's default group, if there is one."""
        dist = torch.distributed
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return ALONE
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def leads(self) -> bool:
        """Does this rank talk to the replicas?"""
        return self.rank == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """All ranks get through its body, or every rank raises: its own error, or the first of
        the others'."""
        error: Exception | None = None
        try:
            yield
        # Whatever it is, the others wait to be told.
        except Exception as exc:
            if self.size == 1:
                raise
            error = exc
        if self.size == 1:
            return
        failed = torch.tensor([int(error is not None)], dtype=torch.int32)
        self._collective(torch.distributed.all_reduce, failed, group=self._group)
        if failed.item():
            known = None if error is None else exchange.unexpected(error).to_dict()
            said = self.gather(msgspec.json.encode(known))
            if error is not None:
                raise error
            rank, first = next((r, d) for r, b in enumerate(said) if (d := msgspec.json.decode(b)))
            other = from_dict(first)
            other.where = f"trainer rank {rank}{': ' if other.where else ''}{other.where}"
            raise other

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank."""
        if self.size == 1:
            return [data]
        sizes = [int(n) for n in self._all(torch.tensor([len(data)]))]
        padded = bytearray(data.ljust(max(sizes), b"\0"))
        rows = self._all(torch.frombuffer(padded, dtype=torch.uint8))
        return [bytes(row[:n].numpy()) for row, n in zip(rows, sizes, strict=True)]

    def _all(self, mine: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self._collective(torch.distributed.all_gather, rows, mine, group=self._group)
        return rows

    def _collective(self, do: Any, *args: Any, **kwargs: Any) -> None:
        try:
            do(*args, **kwargs)
        except RuntimeError as exc:  # gloo's: a peer is gone, or late
            raise TransferError(
                f"the trainer's ranks lost one another: {exc}",
                where=f"trainer rank {self.rank}",
                next_step="see whether all of them run and push; then start the trainer again",
            ) from exc

    def agree(self, what: str, value: object) -> None:
        """Raise on every rank unless all of them bring the same value, which JSON can tell."""
        if self.size == 1:
            return
        rows = self.gather(hashlib.sha256(msgspec.json.encode(value)).digest())
        if odd := [r for r, row in enumerate(rows) if row != rows[0]]:
            raise WeightSyncError(
                f"the trainer's ranks have different {what}: rank 0's are not those of {odd[:20]}",
                next_step="give every rank the same model, options and order of pushes",
            )


ALONE = Ranks(0, 1, None)
