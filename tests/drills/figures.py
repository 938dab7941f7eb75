"""What a drill found, printed and kept in out/drills/, and the seed it can be run again with."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "out" / "drills"


def seed() -> int:
    """`DRILL_SEED`, else a new one; it is among the figures of every drill."""
    return int(os.environ.get("DRILL_SEED") or random.SystemRandom().randrange(2**31))


def keep(drill: str, form: str, found: dict[str, Any]) -> None:
    """Call it before asserting anything: a failed drill's figures are the ones that are wanted."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"drill": drill, "form": form} | found, indent=1, default=str)
    (FOLDER / f"{drill}-{form}.json").write_text(text + "\n")
    print(text, flush=True)
