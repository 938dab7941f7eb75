"""`register()`: the general plugin. vLLM calls it in every process, before a model is built.

What it adds to vLLM: the verb `Worker.weight_sync`; a blueprint of every model; our engine under
`BACKENDS` (vLLM's own stay `upstream_ipc`, …). What it wraps passes through untouched where another
engine is in use.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec

from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.bridge import refuse_sleep

_STATUS = msg.encode_verbs(msg.Status())


def register() -> None:
    """Idempotent. Never raises: vLLM would not start; on failure its own backends stay.

    Nothing unless VLLM_PLUGINS names `wt`: where it is unset vLLM loads every general plugin, but
    no routes.
    """
    from vllm.logger import init_logger

    logger = init_logger("vllm.wt")
    if "wt" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        logger.info("vllm_wt_plugin is installed and not in use: VLLM_PLUGINS does not name wt")
        return
    try:
        _register()
    # vLLM catches a plugin that cannot be imported, not one whose function raises.
    except Exception as exc:
        logger.error("vllm_wt_plugin is off, vLLM's own weight transfer stays in use: %s", exc)
    else:
        logger.info(
            "vllm_wt_plugin: weight transfer backends %s are ours; vLLM's own are %s",
            ", ".join(msg.BACKENDS),
            ", ".join(f"upstream_{name}" for name in msg.BACKENDS),
        )


def _register() -> None:
    from vllm_wt_plugin import _version

    _version.check()
    from vllm_wt_plugin import _vllm
    from vllm_wt_plugin.worker import core as in_core
    from vllm_wt_plugin.worker.engine import IPCEngine

    if os.environ.get("WT_CPU_INPLACE") == "1":
        from vllm_wt_plugin.worker import cpu_inplace

        cpu_inplace.enable()
    if os.environ.get("WT_OWN_SEGMENTS") == "1":
        _vllm.keep_weights_apart()
    _vllm.take_blueprints()
    _vllm.call_every_engine()
    for cls in _vllm.worker_classes():
        cls.weight_sync = _weight_sync
        _vllm.wrap(cls, "sleep", _sleep)
        _vllm.wrap(cls, "wake_up", _wake_up)
        _vllm.wrap(cls, "reload_weights", _reload)
    for core in _vllm.engine_core_classes():
        _vllm.wrap(core, "collective_rpc", _lifecycle)
        _vllm.wrap(core, "resume_scheduler", _refuse_dirty)
        _vllm.wrap(core, "sleep", _refuse_attached)
        _vllm.wrap(core, "set_weight_version", _name)
        for name, method in in_core.METHODS.items():
            setattr(core, name, method)
    try:
        for name in msg.BACKENDS:
            _vllm.swap_engine(name, IPCEngine)
    except BaseException:  # all or none of them
        for name in msg.BACKENDS:
            _vllm.unswap_engine(name)
        raise


def _engine(worker: Any) -> Any | None:
    from vllm_wt_plugin.worker.engine import IPCEngine

    engine = getattr(worker, "weight_transfer_engine", None)
    return engine if isinstance(engine, IPCEngine) else None


def _weight_sync(self: Any, *args: object, **kwargs: object) -> dict[str, Any]:
    """The worker's verb: one argument, bytes, which no JSON caller can send. Never raises, so it
    takes whatever dev mode's /collective_rpc passes on."""
    engine = _engine(self)
    if engine is None:
        error = {
            "code": "UnsupportedVLLM",
            "error": "this engine does not use a backend of vllm_wt_plugin",
            "where": "",
            "next_step": 'start vLLM with --weight-transfer-config \'{"backend": "ipc"}\'',
        }
        return {"rank": self.rank, "state": {"phase": "IDLE", "version": "default"}, "error": error}
    engine.after_commit = self.model_runner.reset_lora_state
    reply: dict[str, Any] = engine.session.call(args[0] if len(args) == 1 and not kwargs else None)
    self._weight_update_active = engine.session.open is not None
    return reply


def _ours(core: Any) -> bool:
    from vllm_wt_plugin import _vllm

    config = core.vllm_config.weight_transfer_config
    served = config is not None and config.backend in msg.BACKENDS
    return served and _vllm.serves(config.backend)  # registration may have failed half-way


def _lifecycle(original: Any) -> Any:
    """vLLM's own lifecycle calls by name, where the engine is ours (`worker/lifecycle.py`)."""

    def collective_rpc(
        self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None
    ) -> Any:
        from vllm_wt_plugin.worker import lifecycle

        if method not in lifecycle.CALLS or not _ours(self):
            return original(self, method, timeout, args, kwargs)
        lifecycle.call(self, method, tuple(args), kwargs)
        return [None] * self.vllm_config.parallel_config.world_size

    return collective_rpc


def _name(original: Any) -> Any:
    """The version that vLLM's own API gives is the workers' too."""

    def set_weight_version(self: Any, version: str) -> None:
        original(self, version)
        if _ours(self):
            payload = msg.encode_verbs(msg.SetVersion(version))
            self.model_executor.collective_rpc("weight_sync", args=(payload,))

    return set_weight_version


def _refuse_dirty(original: Any) -> Any:
    """No resume, by whatever way, while the weights are mixed or about to be."""

    def resume_scheduler(self: Any) -> Any:
        if self.vllm_config.weight_transfer_config is not None:
            for reply in self.model_executor.collective_rpc("weight_sync", args=(_STATUS,)):
                msgspec.convert(reply["state"], msg.State).check_resumable()
        return original(self)

    return resume_scheduler


def _refuse_attached(original: Any) -> Any:
    """No sleep that moves weights while a trainer on this host computes with them."""

    def sleep(self: Any, level: int = 1, *args: Any, **kwargs: Any) -> Any:
        if level >= 1 and self.vllm_config.weight_transfer_config is not None:
            replies = self.model_executor.collective_rpc("weight_sync", args=(_STATUS,))
            refuse_sleep(*(r.get("info", {}).get("attached", {}) for r in replies))
        return original(self, level, *args, **kwargs)

    return sleep


def _sleep(original: Any) -> Any:
    def sleep(self: Any, level: int = 1) -> Any:
        result = original(self, level)
        if (engine := _engine(self)) is not None:
            engine.session.asleep |= {"weights", "kv_cache"}
            if level == 2 and self.device.type != "cpu":
                engine.session.mark_dirty("level 2 sleep discarded the weights")
        return result

    return sleep


def _wake_up(original: Any) -> Any:
    def wake_up(self: Any, tags: list[str] | None = None) -> Any:
        result = original(self, tags)
        if (engine := _engine(self)) is not None:
            engine.session.asleep -= {"weights", "kv_cache"} if tags is None else set(tags)
        return result

    return wake_up


def _reload(original: Any) -> Any:
    """A reload from the model's path brings whole weights: it clears DIRTY."""

    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if (engine := _engine(self)) is not None and engine.session.open is None:
            engine.session.dirty = ""
        return result

    return reload_weights
