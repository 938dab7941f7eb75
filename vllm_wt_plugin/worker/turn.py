"""Whose turn it is, where several API processes drive one engine and each has a lock of its own."""

from __future__ import annotations

import time

from vllm_wt_plugin.errors import UpdateInProgress
from vllm_wt_plugin.worker.open import Draft, Open


class Turn:
    """Kept by an update that has ended here until its process has dropped the caches and resumed
    the engine (the verb `EndTurn`), or for a lease. With one API process (not `shared`) never."""

    def __init__(self, *, shared: bool) -> None:
        self.shared = shared
        self._ended: Open | None = None
        self._deadline = 0.0  # monotonic

    def keep(self, ended: Open, out: Draft) -> None:
        if self.shared:
            self._ended, self._deadline = ended, time.monotonic() + ended.lease_s
            out.info["turn"] = ended.session

    def end(self, session: str) -> None:
        if self._ended is not None and self._ended.session == session:
            self._ended = None

    def expire(self) -> bool:
        """Whether its process died owing a resume."""
        if self._ended is None or time.monotonic() <= self._deadline:
            return False
        gone, self._ended = self._ended, None
        return gone.resume_after

    def check(self, what: str) -> None:
        """Raises UpdateInProgress while the turn is kept."""
        if self._ended is not None:
            raise UpdateInProgress(
                f"{what} is refused: an update of {self._ended.owner or 'an unnamed trainer'} is "
                "about to end",
                next_step="try again",
            )
