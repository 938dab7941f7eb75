"""What a committed update brought, for status and metrics."""

from __future__ import annotations

from typing import Literal

import msgspec


class Moved(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """In the trainer's terms: not what one rank took of it."""

    kind: Literal["dense", "sparse", "in place"]
    bytes: int = 0
    changed: int = 0  # elements
    elements: int = 0  # of the model

    @property
    def share(self) -> float | None:
        return self.changed / self.elements if self.kind == "sparse" and self.elements else None
