"""Which vLLM is taken and which is refused, and in what words. vLLM itself is not imported."""

from __future__ import annotations

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from vllm_wt_plugin import _version
from vllm_wt_plugin.errors import UnsupportedVLLM
from vllm_wt_plugin.worker.register import register


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`.version` and `.cpu` of the vLLM that is imported."""
    now = SimpleNamespace(version="0.32.0", cpu=True)

    class Vllm(ModuleType):
        @property
        def __version__(self) -> str:
            version: str = now.version
            return version

    stand_ins = {
        "vllm": Vllm("vllm"),
        "vllm.platforms": SimpleNamespace(current_platform=SimpleNamespace(is_cpu=lambda: now.cpu)),
        "vllm.logger": SimpleNamespace(init_logger=logging.getLogger),
        "vllm_wt_plugin._vllm": None,  # an import of it would fail: it is asked for too early
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delattr("vllm_wt_plugin._vllm", raising=False)
    return now


@pytest.mark.parametrize("version", ["0.29.0", "0.30.1", "0.31.0+cpu", "0.32.0", "0.33.1"])
def test_taken_on_cpu(vllm: SimpleNamespace, version: str) -> None:
    vllm.version = version
    _version.check()


@pytest.mark.parametrize(
    ("version", "cpu", "range_"),
    [
        ("0.28.3", True, "vLLM >= 0.29, < 0.34"),
        ("0.34.0", True, "vLLM >= 0.29, < 0.34"),
        ("1.0.0", True, "vLLM >= 0.29, < 0.34"),
        ("0.31.0", False, "vLLM >= 0.32, < 0.34"),
        ("0.34.0", False, "vLLM >= 0.32, < 0.34"),
        ("dev", False, "vLLM >= 0.32, < 0.34"),
    ],
)
def test_refused_in_one_line(
    vllm: SimpleNamespace,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cpu: bool,
    range_: str,
) -> None:
    """Before anything of vLLM is imported that such a version may lack, or changed."""
    vllm.version, vllm.cpu = version, cpu
    with pytest.raises(UnsupportedVLLM, match=range_):
        _version.check()
    monkeypatch.setenv("VLLM_PLUGINS", "other,wt")
    register()
    (record,) = caplog.records
    said = record.getMessage()
    assert said.startswith("vllm_wt_plugin is off, vLLM's own weight transfer stays in use: ")
    assert f"vLLM {version} is not supported{' on CPU' * cpu}" in said
    assert "\n" not in said


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("plugins", [None, "", "other", "wtx"])
def test_without_its_name_it_does_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, plugins: str | None
) -> None:
    """Where VLLM_PLUGINS is unset, vLLM calls every general plugin."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    monkeypatch.setattr(_version, "check", lambda: pytest.fail("it went on"))
    caplog.set_level("INFO", "vllm.wt")
    register()
    assert [r.levelname for r in caplog.records] == ["INFO"]
    assert "does not name wt" in caplog.text
