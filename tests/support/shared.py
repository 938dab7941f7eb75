"""Shared memory as this process has it: other tests run beside, on the same /dev/shm."""

from __future__ import annotations

import re
from pathlib import Path


def mapped() -> set[str]:
    """Names of the segments of ours that are mapped here."""
    return set(re.findall(r"/dev/shm/(wt_[0-9a-f]{32})", Path("/proc/self/maps").read_text()))
