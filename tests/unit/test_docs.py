"""What the documentation says that code can check. The site itself: `make docs`."""

from __future__ import annotations

import re
from pathlib import Path

import prometheus_client
import pytest
from typer.main import get_command

from vllm_wt_plugin.cli.app import app
from vllm_wt_plugin.cli.exits import Exit
from vllm_wt_plugin.errors import BY_CODE
from vllm_wt_plugin.server.metrics import Metrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def table(page: str) -> dict[str, list[str]]:
    """Rows whose first cell is code, by it."""
    rows = [line.strip("| ").split(" | ") for line in (DOCS / page).read_text().splitlines()]
    return {m[1]: r[1:] for r in rows if (m := re.match(r"`([^`]+)`$", r[0]))}


def test_the_catalogue_names_every_error_with_its_status() -> None:
    rows = table("errors.md")
    assert rows.keys() == BY_CODE.keys()
    for name, (status, cause, step) in rows.items():
        assert str(BY_CODE[name].status) in status.split(", "), name
        assert cause.strip()
        assert step.strip()


def test_every_metric_is_described() -> None:
    registry = prometheus_client.CollectorRegistry()
    made = Metrics(registry)
    assert made is not None
    names = {m.name for m in registry.collect()}
    text = (DOCS / "operating.md").read_text()
    described = set(re.findall(r"`(vllm_wt_\w+?)(?:_total)?(?:\{\w+\})?`", text))
    assert described == names


def test_every_command_and_exit_code_is_described() -> None:
    text = (DOCS / "operating.md").read_text()
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(re.findall(r"^\| `vllm-wt (\w+)", text, re.M)) == commands.keys()
    assert {int(n) for n in re.findall(r"^\| (\d) \|", text, re.M)} == set(Exit)


@pytest.mark.parametrize("page", sorted(p.name for p in DOCS.glob("*.md")))
def test_charts_and_files_that_pages_name_exist(page: str) -> None:
    text = (DOCS / page).read_text()
    for chart in re.findall(r"\(charts/([^)]+)\)", text):
        assert (ROOT / "benchmarks" / "results" / chart).is_file()
    for path in re.findall(r"`((?:examples|benchmarks|tests|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path
