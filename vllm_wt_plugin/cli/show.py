"""What commands print: tables and bars for people, one JSON object for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from vllm_wt_plugin.cli.exits import Exit, exit_of
from vllm_wt_plugin.errors import WeightSyncError

WIDE = 160  # into a file or a pipe
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
err = Console(stderr=True, highlight=False, soft_wrap=True)
STYLES = {"ok": "green", "IDLE": "green", "problem": "red", "DIRTY": "red", "UPDATING": "yellow"}


def as_json(data: Mapping[str, Any]) -> None:
    """One object on one line of standard output."""
    sys.stdout.write(json.dumps(data) + "\n")
    sys.stdout.flush()


def leave(code: Exit) -> NoReturn:
    raise typer.Exit(code)


@contextmanager
def errors(json_: bool) -> Iterator[None]:
    """An error of ours as its text (or JSON) and exit code, never a traceback."""
    try:
        yield
    except WeightSyncError as exc:
        if json_:
            as_json(exc.to_dict())
        else:
            err.print(f"[bold red]{type(exc).__name__}[/]", end=": ")
            err.print(str(exc), markup=False)
        leave(exit_of(exc))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Numbers to the right; states in their colours."""
    shown = Table(title=title, title_justify="left", header_style="bold")
    for name in columns:
        right = name in ("bytes", "seconds", "GB/s", "changed", "world") or name.startswith(
            ("ms", "x ")
        )
        shown.add_column(
            name,
            justify="right" if right else "left",
            overflow="fold",
            no_wrap=name not in ("found", "what to do"),
        )
    for row in rows:
        shown.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    out.print(shown)


def size(n: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


class _Speed(ProgressColumn):
    """GB/s over the whole of the task so far: rich's own is in bytes, and of the last moments."""

    def render(self, task: Task) -> Text:
        seconds = task.elapsed or 0.0
        return Text(f"{task.completed / seconds / 1e9:.2f} GB/s" if seconds else "")


@contextmanager
def bars(hidden: bool) -> Iterator[Progress]:
    """A row for each server, on standard error."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), _Speed(),
        TimeElapsedColumn(), TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    with Progress(*columns, console=err, disable=hidden) as progress:
        yield progress


def ago(at: float) -> str:
    """A Unix time, as people say it."""
    seconds = max(0.0, time.time() - at)
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
