"""The weight transfer engine vLLM creates for `"backend": "ipc"`: its lifecycle onto a session."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from vllm_wt_plugin import _pynccl, _vllm
from vllm_wt_plugin._vllm import VllmHost, init_logger
from vllm_wt_plugin.errors import RequestError, from_dict
from vllm_wt_plugin.sparse.patch import SparseWeightPatch, received
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.transport.memory import MemoryExporter
from vllm_wt_plugin.transport.patches import share
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.sparse import patches
from vllm_wt_plugin.wire.update import UpdateInfo
from vllm_wt_plugin.worker.link import Link
from vllm_wt_plugin.worker.session import WorkerSession

logger = init_logger("vllm.wt.worker")


class IPCEngine(WeightTransferEngine[WeightTransferInitInfo, WeightTransferUpdateInfo]):  # type: ignore[misc]
    """Pulls weights from trainers on this host, straight into live parameters, by the load plan.

    Created by vLLM's factory after the model is loaded, on every worker. `session` is what the
    verbs drive; the methods below are vLLM's own interface to the same session.
    """

    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        parallel = vllm_config.parallel_config
        self.after_commit: Any = lambda: None  # set by the worker: it resets LoRA state
        self._session_id = ""
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.session = WorkerSession(
            lambda: VllmHost(self.model, vllm_config, device),
            Importer(device.index),
            rank=rank,
            world_size=parallel.world_size_across_dp,
            log=logger.error,
            after_commit=lambda: self.after_commit(),  # noqa: PLW0108 (set later)
            synchronize=self._synchronize,
            shadow=_setting(vllm_config, "shadow", "cpu"),
            partial=_setting(vllm_config, "partial", True),
            link=Link(rank, device, _pynccl.load, _vllm.shared_nccl_env),
            shared=parallel._api_process_count > 1,
        )

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()

    def _run(self, *verbs: msg.Verb) -> None:
        """Raises what this rank says."""
        reply = self.session.call(msg.encode_verbs(*verbs))
        if reply["error"]:
            o = self.session.open
            if o is not None and o.session == self._session_id:  # a half must not be committed
                self.session.abort(reply["error"]["error"])
            raise from_dict(reply["error"])

    # vLLM's interface to an engine, for who drives one worker by hand. vLLM's own calls to all
    # workers are answered in the engine core, where ranks can agree (`worker/lifecycle.py`).

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        return init_dict

    def init_transfer_engine(self, init_info: Any) -> None:
        self._run(msg.Init(init_info))

    def start_weight_update(self, is_checkpoint_format: bool = True) -> None:
        self._session_id = secrets.token_hex(16)
        self._run(msg.Begin(self._session_id, "a vLLM client", msg.LEASE_S, False))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        key = secrets.token_hex(16)
        info = msg.convert(update_info, UpdateInfo)
        if info.update_kind == "sparse_flat":
            verb: msg.Verb = msg.PreparePatches(self._session_id, patches(info, key))
        else:
            verb = msg.PreparePart(self._session_id, key, (info.registrations(key),))
        self._run(verb, msg.Apply(self._session_id))

    def receive_weights(self, update_info: Any) -> None:
        self.update_weights(update_info)

    def receive_sparse_weights(
        self,
        update_info: dict[str, Any],
        apply_patches: Callable[[list[SparseWeightPatch]], object] | None = None,
    ) -> None:
        """The patches of one update call, views of the trainer's memory, to `apply_patches`
        (default: the method of this name). Raises what is wrong with them."""
        push = patches(msg.convert(update_info, UpdateInfo), secrets.token_hex(16))
        known = self.session.known
        try:
            (apply_patches or self.apply_patches)(received(push, known.patch_memory(push)))
        finally:
            known.close_patches(push.registration)

    def apply_patches(self, given: list[SparseWeightPatch]) -> None:
        """Write them into the live weights, by the load plan, as a part of the update that
        `start_weight_update` opened; `finish_weight_update` commits, an error takes all back.
        Raises what this rank finds wrong, naming the parameter."""
        places = self.session.known.places_for()
        whole = [
            p if p.full_shape is not None else replace(p, full_shape=places.spec(p.name).shape)
            for p in given
        ]
        with MemoryExporter() as exporter:
            push = patches(share(whole, exporter), secrets.token_hex(16))
            try:
                self._run(msg.PreparePatches(self._session_id, push), msg.Apply(self._session_id))
            finally:
                self.session.known.close_patches(push.registration)

    def finish_weight_update(self) -> None:
        self._run(msg.Commit(self._session_id, None))

    def shutdown(self) -> None:
        self._run(msg.Abort("", "shutdown"), msg.Shutdown())


def _setting(vllm_config: Any, name: str, on: object) -> bool:
    """`--additional-config '{"wt": {NAME: ON}}'`. `shadow` "cpu": keep host copies of what is
    computed from, so that it takes patches. `partial` true: an update in parts may leave the rest
    of the weights as it is."""
    settings = dict(getattr(vllm_config, "additional_config", None) or {}).get("wt") or {}
    value = settings.get(name)
    if value not in (None, False, on):
        raise RequestError(
            f"additional_config wt.{name} is {value!r}", next_step=f"use {on!r}, or leave it out"
        )
    return value == on
