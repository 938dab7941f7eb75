"""Filling buckets that are broadcast, from tensors that last or from a walk that makes them.

source → Filling (planned once) or Walk (one tensor at a time) → fill(0) … fill(n - 1), finish
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from vllm_wt_plugin.sparse.patch import WORDS
from vllm_wt_plugin.trainer.listing import Listing
from vllm_wt_plugin.trainer.packed import Rows
from vllm_wt_plugin.wire.buckets import Bucket

See = Callable[[str, torch.Tensor], None]
_Copies = list[tuple[list[torch.Tensor], list[torch.Tensor]]]  # of one width: places, sources


class Filling:
    """Of a listing's tensors, into buckets that take turns in `memory`: what goes where is worked
    out once, and a bucket is one call of torch for each width, on the current stream.

    `ahead`: no call waits for a GPU.
    """

    def __init__(
        self, source: Listing, buckets: Sequence[Bucket], memory: Sequence[torch.Tensor]
    ) -> None:
        self.source, self._rows = source, list(source)
        rows = Rows(self._rows)
        self._copies = [
            _together([rows.pair(p, memory[i % len(memory)]) for p in bucket])
            for i, bucket in enumerate(buckets)
        ]
        rows.finish()
        self.ahead = all(t.device == memory[0].device for _, t in self._rows)

    def fill(self, index: int) -> None:
        for places, sources in self._copies[index]:
            torch._foreach_copy_(places, sources)

    def finish(self) -> None:
        """All tensors were there when this was made."""

    def exhaust(self) -> None:
        """Nobody walks with it."""


class Walk:
    """Of a source that makes its tensors one at a time, `see` is told of each."""

    ahead = False

    def __init__(
        self, source: Listing, buckets: Sequence[Bucket], memory: Sequence[torch.Tensor], see: See
    ) -> None:
        self._buckets, self._memory, self._rows = buckets, memory, Rows(source, see)

    def fill(self, index: int) -> None:
        for piece in self._buckets[index]:
            self._rows.write(piece, self._memory[index % len(self._memory)])

    def finish(self) -> None:
        """Raises RequestError if there is more than was announced."""
        self._rows.finish()

    def exhaust(self) -> None:
        """Walk on after a failure, as ranks that gather together must."""
        self._rows.exhaust()


def _together(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> _Copies:
    """As plain words: of some dtypes (fp8) torch copies no lists."""
    out: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for place, rows in pairs:
        word = WORDS[place.element_size()]
        places, sources = out[place.element_size()]
        places.append(place.view(word))
        sources.append(rows.detach().view(word))
    return list(out.values())
