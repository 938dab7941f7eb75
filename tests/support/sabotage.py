"""A vLLM general plugin that breaks ours on purpose, in every process of a server.

Discovered as any plugin is, by a `dist-info` on PYTHONPATH, and before ours, because that path
comes first. What it breaks is named in SABOTAGE; files in SABOTAGE_FLAGS make one call fail once.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment(folder: Path, what: str = "") -> dict[str, str]:
    """Installs the plugin in `folder`; the environment of a server that shall have it."""
    info = folder / "wt_sabotage-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: wt_sabotage\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nsabotage = tests.support.sabotage:register\n"
    )
    path = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "SABOTAGE": what,
        "SABOTAGE_FLAGS": str(folder),
    }


def _import_error() -> None:
    sys.modules["vllm_wt_plugin.worker.register"] = None  # type: ignore[assignment]


def _register_raises() -> None:
    """In the middle: vLLM's methods are wrapped and one backend is ours, the next is not."""
    from vllm_wt_plugin import _vllm

    swap = _vllm.swap_engine

    def swap_engine(name: str, engine: Any) -> None:
        if name == "nccl":
            raise RuntimeError("sabotage: register")
        swap(name, engine)

    _vllm.swap_engine = swap_engine


def _attach_raises() -> None:
    """In the middle: the routes are there already, the rules for who may call them are not."""
    from vllm_wt_plugin.server import plugin

    del plugin.AccessMiddleware


def _old_vllm() -> None:
    import vllm

    vllm.__version__ = "0.28.9"


def _fail_on_flags() -> None:
    from vllm.v1.engine.core import EngineCore

    from vllm_wt_plugin.transport.ipc import Importer
    from vllm_wt_plugin.worker.plan.update import Update

    _fail(Importer, "open", rank=1)  # nothing is written yet
    _fail(Update, "finish", rank=1)  # everything else is written
    _fail(EngineCore, "reset_prefix_cache", result=False)


def _fail(owner: Any, name: str, *, rank: int | None = None, result: Any = None) -> None:
    """`owner.name` fails once, on one rank, when its flag is there: raises, or gives `result`."""
    original = getattr(owner, name)
    flag = Path(os.environ["SABOTAGE_FLAGS"], name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if (rank is None or _rank() == rank) and flag.exists():
            flag.unlink()
            if result is None:
                raise RuntimeError(f"sabotage: {name}")
            return result
        return original(*args, **kwargs)

    setattr(owner, name, method)


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_initialized() else 0


def register() -> None:
    """The entry point. `import` has done its work when this module was loaded."""
    what = os.environ.get("SABOTAGE", "")
    breaks = {
        "": _fail_on_flags,
        "register": _register_raises,
        "attach": _attach_raises,
        "version": _old_vllm,
    }
    breaks.get(what, lambda: None)()


if os.environ.get("SABOTAGE") == "import":
    _import_error()
