"""`VLLMWeightBridge`: the trainer's end. Attach once; then every optimiser step is the update.

Engines on other nodes have memory of their own: there the step is followed by a broadcast
(`nodes.py`).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vllm_wt_plugin.bridge.config import BridgeConfig
from vllm_wt_plugin.bridge.group import broadcast_object_list, init_process_group
from vllm_wt_plugin.bridge.master import Masters
from vllm_wt_plugin.bridge.model import Layout, loaded, skeleton
from vllm_wt_plugin.bridge.nodes import InferenceNodes
from vllm_wt_plugin.errors import RequestError, StateError, WeightSyncError, from_dict
from vllm_wt_plugin.trainer.client import HTTPClient
from vllm_wt_plugin.transport import shm
from vllm_wt_plugin.transport.ipc import Importer
from vllm_wt_plugin.transport.layout import Span
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.bridge import DetachBody, ExportBody, NotifyBody
from vllm_wt_plugin.wire.handles import Registration
from vllm_wt_plugin.wire.params import ParamSpec

logger = logging.getLogger(__name__)


class VLLMWeightBridge:
    """A model whose parameters are the tensors that a vLLM server on this host computes with.

    With inference nodes (`BridgeConfig.num_inference_nodes`) a model of the trainer's own, which
    every update broadcasts to the engines there.

        bridge = VLLMWeightBridge(BridgeConfig(model_name=…, vllm_api_url=…))
        model = bridge.get_trainable_model()
        optimizer = AdamW(bridge.parameters())
        …
        with bridge.update(version=step):
            optimizer.step()

    `token` defaults to `WT_TOKEN`. Not thread-safe. `cleanup()` (or leaving a `with`) detaches;
    the model must not be used afterwards.
    """

    def __init__(self, config: BridgeConfig, *, token: str | None = None) -> None:
        self.config = config
        self.device = torch.device(config.device)
        self.shared_state_dict: dict[str, Tensor] = {}  # checkpoint names → views
        token = os.environ.get("WT_TOKEN") if token is None else token
        self._http = HTTPClient(config.vllm_api_url, token=token, timeout_s=config.timeout_seconds)
        self._nodes = None if config.is_local_mode else InferenceNodes(config, token)
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._importer = Importer(self.device.index, write=True)
        self._presence: shm.Segment | None = None
        self._attached = ""
        self._model: nn.Module | None = None
        self._masters: Masters | None = None
        self._group: dist.ProcessGroup | None = None
        self._updates = 0
        self._initialized = self._closed = False

    # ---- attaching --------------------------------------------------------------------

    def initialize(self) -> None:
        """Reach the servers, and join the other trainers if there are any. Idempotent.

        Raises ServerUnreachable; with several trainers it is a collective of them.
        """
        if self._closed:
            raise StateError("this bridge is closed", next_step="make a new one")
        if self._initialized:
            return
        method = self.config.init_method
        if self._nodes is not None:
            self._nodes.check()
            method = self._nodes.meet if method == "env://" else method
        elif self.config.use_cuda_ipc:
            self._http.get("/bridge/status")
        if self.config.world_size > 1:
            self._group = init_process_group(
                "gloo",
                method,
                timedelta(seconds=self.config.timeout_seconds),
                self.config.world_size,
                self.config.trainer_rank,
                group_name="wt_bridge",
            )
        self._initialized = True

    def attach_to_vllm_weights(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """vLLM's own tensors, which the model shall be made of: checkpoint names → memory.

        With `use_cuda_ipc` the server is asked for views of its memory, and of `state_dict` only
        names, shapes and dtypes are read (meta tensors will do). Without, the tensors given are
        that memory (a trainer inside the engine's process, or one with handles of its own). With
        inference nodes they are the trainer's own, and what it broadcasts.
        """
        self.initialize()
        if self._nodes is not None or not self.config.use_cuda_ipc:
            self.shared_state_dict = {n: t.detach() for n, t in state_dict.items()}
        else:
            specs = tuple(
                ParamSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
                for n, t in state_dict.items()
            )
            self.shared_state_dict = self._attach(specs)
        return self.shared_state_dict

    def _attach(self, specs: tuple[ParamSpec, ...]) -> dict[str, Tensor]:
        if self._attached:
            raise StateError("this bridge is attached already", next_step="cleanup() first")
        here = torch.zeros(1, dtype=torch.uint8).untyped_storage()
        presence = shm.Segment(here, Span(0, 1, "the bridge"))
        try:
            answer = self._http.post(
                "/bridge/export_cuda_ipc", ExportBody(specs, presence.handle, self._owner)
            )
            registration = msgspec.convert(answer["registration"], Registration)
            self._attached, self._presence = answer["attached"], presence
            views = self._importer.open(registration)
            self._importer.wait(registration)
        except BaseException:  # raised again: an interrupt too must leave nobody attached
            self._detach()
            presence.close()
            raise
        return views

    def get_trainable_model(self, *, master: Literal["fp32"] | None = None) -> nn.Module:
        """The transformers model, every parameter a view of vLLM's memory, in training mode.

        With inference nodes: loaded from its checkpoint. Always the same one. `master="fp32"`:
        `parameters()` are fp32 copies for the optimiser, which `update` feeds with the model's
        gradients and writes back. Raises PlanError that names each parameter without a view: all
        of them have one, or there is no model.
        """
        if master not in (None, "fp32"):
            raise RequestError(f"master={master!r}", next_step='use "fp32" or None')
        if self._model is None:
            self.initialize()
            name = self.config.model_name or self.status()["model"]
            if self._nodes is not None and not self.shared_state_dict:
                self._model = loaded(name, self.device).train()
            else:
                self._model = self._of_views(name).train()
        if master is not None and self._masters is None:
            self._masters = Masters(self._model.parameters())
        return self._model

    def _of_views(self, name: str) -> nn.Module:
        layout = Layout(skeleton(name))
        if not self.shared_state_dict:
            if not self.config.use_cuda_ipc:
                raise StateError(
                    "no memory is attached",
                    next_step="attach_to_vllm_weights(…), or use_cuda_ipc=True",
                )
            self.shared_state_dict = self._attach(layout.specs)
        layout.install(self.shared_state_dict, self.device)
        return layout.model

    def parameters(self) -> list[nn.Parameter]:
        """What the optimiser shall step: the model's parameters, or their fp32 masters."""
        if self._masters is not None:
            return self._masters.parameters
        return [p for p in self.get_trainable_model().parameters() if p.requires_grad]

    # ---- updates ----------------------------------------------------------------------

    @contextmanager
    def update(
        self,
        version: str | int | None = None,
        mode: Literal["pause", "overlap"] = "pause",
        lease_s: float = msg.LEASE_S,
    ) -> Iterator[None]:
        """Write the weights inside. Generation stops meanwhile; at the end they are `version`
        (default: a counter), caches of the old ones are dropped, and generation goes on.

        `mode="overlap"` lets requests be answered while the weights are half new. An error inside
        leaves the engine DIRTY (it may be half written) until the next update or push. The engine
        waits `lease_s` at most. Raises what the server says; then it serves no mixed weights.
        Without `use_cuda_ipc` whoever attached the memory tells the engine; this does not. With
        inference nodes the weights are broadcast at the end, a collective of the trainers, and the
        engines pause for that alone, in either mode.
        """
        if mode not in ("pause", "overlap"):
            raise RequestError(f"mode={mode!r}", next_step='use "pause" or "overlap"')
        name = str(self._updates + 1 if version is None else version)
        if self._nodes is not None:
            with self._written():
                yield
            self._broadcast(name)
            return
        if mode == "overlap":
            self._http.get("/bridge/status")  # a dead server is found out before the step
            with self._written():
                yield
            self.notify_update(name)
            return
        session = ""
        if self.config.use_cuda_ipc:
            body = msg.StartBody(self._owner, lease_s, attached=self._attached)
            session, _ = self._http.start(body)
        try:
            with self._written():
                yield
        # The user's own code, and interrupts: whatever ends a step, the server must hear of it now
        # and not when the lease ends. Raised again.
        except BaseException as exc:
            if session:
                self._http.abort(session, f"the trainer's step failed: {type(exc).__name__}: {exc}")
            raise
        self._updates += 1
        if session:
            self._http.post("/finish_weight_update", msg.FinishBody(name, session))

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Masters around the step; at the end, everything is in the shared memory."""
        if self._masters is not None:
            self._masters.take_gradients()
        yield
        if self._masters is not None:
            self._masters.write_back()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def notify_update(self, version: str | int | None = None) -> None:
        """The weights were written outside of `update`: name them, drop caches of the old ones.

        With inference nodes: broadcast them. A collective of the trainers then.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self._nodes is not None:
            self._broadcast(None if version is None else str(version))
            return
        self._updates += 1
        body = NotifyBody(
            self._updates, self.config.trainer_rank, time.time(), self._attached,
            None if version is None else str(version),
        )  # fmt: skip
        self._http.post("/bridge/notify_update", body)

    def broadcast_weights_to_inference(self) -> None:
        """Make the engines serve the trainer's weights. On this host they do: their memory is the
        trainer's, so that this only tells them. A collective of the trainers otherwise."""
        self.notify_update()

    def _broadcast(self, version: str | None) -> None:
        """Rank 0 sends and tells the other trainers what became of it; all raise that."""
        self.initialize()
        if self._nodes is None or (self._model is None and not self.shared_state_dict):
            raise StateError(
                "there are no weights to send", next_step="call get_trainable_model() first"
            )
        self._updates += 1
        told: list[Any] = [None]
        try:
            self._nodes.push(self._model or self.shared_state_dict, version or self._updates)
        except WeightSyncError as exc:
            if self._group is None:
                raise
            told = [exc.to_dict()]
        if self._group is not None:
            broadcast_object_list(told, 0, self._group)
        if told[0] is not None:
            raise from_dict(told[0])

    def barrier(self) -> None:
        """Wait for the other trainers. A collective of them; nothing to do for one alone."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def status(self) -> dict[str, Any]:
        """Who is attached to the server (the first inference node's), its version and state."""
        http = self._http if self._nodes is None else self._nodes.first
        return http.get("/bridge/status")

    # ---- the end ----------------------------------------------------------------------

    def cleanup(self) -> None:
        """Detach and forget the model. Idempotent; a server that is gone is left alone."""
        if self._closed:
            return
        self._closed = True
        self._model, self._masters, self.shared_state_dict = None, None, {}
        self._detach()
        self._importer.close()
        if self._presence is not None:
            self._presence.close()
            self._presence = None
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        if self._nodes is not None:
            self._nodes.close()
        self._http.close()
        shm.sweep_orphans()  # what a server that was killed left

    def _detach(self) -> None:
        if not self._attached:
            return
        attached, self._attached = self._attached, ""
        try:
            self._http.post("/bridge/detach", DetachBody(attached))
        except WeightSyncError as exc:
            logger.warning("the server was not told that the bridge is closed: %s", exc)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.cleanup()


def create_bridge_from_training_config(config: Any) -> VLLMWeightBridge:
    """A bridge for `BridgeConfig.from_training_config(config)`, initialized."""
    bridge = VLLMWeightBridge(BridgeConfig.from_training_config(config))
    bridge.initialize()
    return bridge
