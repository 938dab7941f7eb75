"""A source's tensors as one push sees them: listed anew only where something has moved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_wt_plugin.trainer.source import Source, as_source, device_of, fingerprint
from vllm_wt_plugin.wire.params import ParamSpec


@dataclass(frozen=True, eq=False)
class Listing:
    """`tensors` is None where a pass makes them (gathers, computes, reads files): every iteration
    is a pass then. The same object twice: the same tensors in the same memory."""

    source: Source
    specs: tuple[ParamSpec, ...]
    tensors: list[tuple[str, Tensor]] | None
    marks: list[tuple[object, ...]] | None

    @property
    def device(self) -> torch.device:
        """Where the tensors are, or will be."""
        return self.tensors[0][1].device if self.tensors else device_of(self.source)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.source if self.tensors is None else self.tensors)


class Lister:
    """Keeps the last listing: planning a source of a big model takes 0.2 s, listing it 13 ms, to
    see that nothing has moved 2 ms. What is kept holds the tensors, so no address comes again."""

    def __init__(self) -> None:
        self._source: tuple[object, Source] | None = None
        self._last: Listing | None = None

    @property
    def given(self) -> object | None:
        """What was listed last."""
        return None if self._source is None else self._source[0]

    def recall(self, given: object) -> Listing | None:
        """The last listing of the same source, without a look at it: it may have changed."""
        return self._last if self.given is given else None

    def list(self, given: object) -> Listing:
        """Of anything that `as_source` takes."""
        if self._source is None or self._source[0] is not given:
            self._source, self._last = (given, as_source(given)), None
        source = self._source[1]
        marks = fingerprint(source)
        if marks is None:
            return Listing(source, source.specs(), None, None)
        if self._last is None or self._last.marks != marks:
            tensors = list(source)
            specs = tuple(
                ParamSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
                for n, t in tensors
            )
            self._last = Listing(source, specs, tensors, marks)
        return self._last

    def close(self) -> None:
        self._source = self._last = None
