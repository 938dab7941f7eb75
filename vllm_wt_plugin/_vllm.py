"""The one file that knows vLLM's insides, and so the one that differs between its versions.

Everything here was read in vLLM 0.29 to 0.33. Importing this module imports vLLM; whether this is
a version that it knows, `_version.py` tells before.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader import utils as loader_utils
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.engine.core import DPEngineCoreProc, EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.worker.gpu_worker import Worker

from vllm_wt_plugin.errors import UnsupportedVLLM
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.blueprint import Blueprint
from vllm_wt_plugin.worker.plan.host import Hook

_BLUEPRINT = "_wt_blueprint"

__all__ = [
    "EngineCore",
    "VllmHost",
    "WeightTransferEngine",
    "init_logger",
    "keep_weights_apart",
    "swap_engine",
    "take_blueprints",
    "worker_classes",
    "wrap",
]


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `make(original)`, once; a second call changes nothing."""
    original = owner.__dict__.get(name)
    if original is None or getattr(original, "_wt_wrapped", False):
        return
    wrapped: Any = functools.wraps(original)(make(original))
    wrapped._wt_wrapped = True
    setattr(owner, name, wrapped)


def swap_engine(name: str, engine: type[WeightTransferEngine]) -> None:
    """Serve `name` with our engine; vLLM's own stays reachable as `upstream_<name>`."""
    registry = WeightTransferEngineFactory._registry
    if f"upstream_{name}" not in registry and name in registry:
        registry[f"upstream_{name}"] = registry[name]
    registry[name] = lambda: engine


def serves(name: str) -> bool:
    """Whether `swap_engine` was done, in this process."""
    return f"upstream_{name}" in WeightTransferEngineFactory._registry


def unswap_engine(name: str) -> None:
    """Undo `swap_engine`."""
    registry = WeightTransferEngineFactory._registry
    if (upstream := registry.pop(f"upstream_{name}", None)) is not None:
        registry[name] = upstream


def take_blueprints() -> None:
    """Have a `Blueprint` taken of every model that vLLM builds, before it is loaded."""

    def make(original: Any) -> Any:
        def record_metadata_for_reloading(model: nn.Module) -> None:
            original(model)
            blueprint = Blueprint(model, unwrap=_unwrap_loader)
            # Past nn.Module.__setattr__: a plain attribute that no registry sees.
            model.__dict__[_BLUEPRINT] = blueprint

        return record_metadata_for_reloading

    wrap(loader_utils, "record_metadata_for_reloading", make)


def _unwrap_loader(value: Any) -> Any:
    """Online quantisation wraps `weight_loader` to count elements; recording wants the inner."""
    while getattr(value, "__name__", "") == "online_process_loader":
        value = value.__wrapped__
    return value


def worker_classes() -> list[type[Worker]]:
    """Worker classes of this platform that define methods of their own."""
    if not current_platform.is_cpu():
        return [Worker]
    from vllm.v1.worker.cpu_worker import CPUWorker

    return [Worker, CPUWorker]


def plain_experts(experts: Any, layer: nn.Module) -> None:
    """What the CPU's experts note when they are loaded, without packing the weights."""
    experts._use_zentorch = False
    for name in ("use_grouped_topk", "renormalize", "scoring_func", "custom_routing_function"):
        if hasattr(experts, name):  # 0.29, where they choose each token's experts themselves
            setattr(experts, name, getattr(layer, name))


def experts_apply(experts: type, apply: Callable[..., None]) -> Callable[..., Any]:
    """`apply` in the form in which this vLLM calls the CPU's experts, by keywords."""
    if not hasattr(experts, "_select_experts"):
        return apply

    def choose_and_apply(
        self: Any, *, hidden_states: torch.Tensor, router_logits: torch.Tensor, **rest: Any
    ) -> torch.Tensor:
        grouping = ("num_expert_group", "topk_group", "e_score_correction_bias",
                    "routed_scaling_factor")  # fmt: skip
        chosen = {name: rest.pop(name) for name in grouping}
        weights, ids = self._select_experts(hidden_states, router_logits, **chosen)
        if rest["apply_router_weight_on_input"]:
            hidden_states = hidden_states * weights.to(hidden_states.dtype)
        output = torch.empty_like(hidden_states)
        apply(
            self, output=output, hidden_states=hidden_states,
            topk_weights=weights, topk_ids=ids, **rest,
        )  # fmt: skip
        return output

    return choose_and_apply


def keep_weights_apart() -> None:
    """Load weights into CUDA segments of their own, which nothing else is ever put into: a handle
    opens a whole segment. Memory that loading frees stays with them."""

    def make(original: Any) -> Any:
        def memory_pool(self: Any, tag: str) -> AbstractContextManager[object]:
            given: AbstractContextManager[object] = original(self, tag)
            if tag != "weights" or self.device.type != "cuda" or type(given) is not nullcontext:
                return given  # a pool of vLLM's own
            self._wt_weights = torch.cuda.MemPool()
            return torch.cuda.use_mem_pool(self._wt_weights)

        return memory_pool

    wrap(Worker, "_maybe_get_memory_pool_context", make)


def shared_nccl_env() -> AbstractContextManager[object]:
    """Without the NCCL settings that vLLM pins for its own groups: other processes lack them."""
    if not current_platform.is_cuda():
        return nullcontext()
    try:
        from vllm.utils.nccl import unpinned_nccl_env
    except ImportError:  # a version that pins none
        return nullcontext()
    unpinned: AbstractContextManager[object] = unpinned_nccl_env()
    return unpinned


def call_every_engine() -> None:
    """Before 0.32 the API server's client has no call to all data-parallel engines: add it."""
    if hasattr(AsyncMPClient, "call_utility_all_async"):
        return

    async def call_utility_all_async(self: Any, method: str, *args: Any) -> list[Any]:
        engines = self.core_engines
        return await asyncio.gather(
            *(self._call_utility_async(method, *args, engine=e) for e in engines)
        )

    AsyncMPClient.call_utility_all_async = call_utility_all_async


def engine_core_classes() -> list[type[EngineCore]]:
    return [EngineCore, DPEngineCoreProc]


class VllmHost:
    """The `Host` of the load plan for one model of one vLLM worker."""

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
        self.model, self.vllm_config, self.device = model, vllm_config, device
        blueprint = model.__dict__.get(_BLUEPRINT)
        if blueprint is None:
            raise UnsupportedVLLM(
                f"no record of {type(model).__name__} from before it was loaded",
                next_step="name `wt` in VLLM_PLUGINS for every process of the engine",
            )
        self.blueprint: Blueprint = blueprint
        if vllm_config.parallel_config.enable_eplb:
            raise UnsupportedVLLM(
                "expert load balancing moves experts while serving",
                where="enable_eplb",
                next_step="serve without --enable-eplb, or with the backend upstream_ipc",
            )
        text = vllm_config.model_config.hf_text_config
        self.num_hidden_layers: int | None = getattr(text, "num_hidden_layers", None)
        self.tied_head = bool(getattr(text, "tie_word_embeddings", False)) or bool(
            getattr(vllm_config.model_config.hf_config, "tie_word_embeddings", False)
        )

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        with disable_mtp_completeness_check():
            return self.model.load_weights(weights)  # type: ignore[operator]

    def checkpoint(self) -> tuple[ParamSpec, ...]:
        """Reads the files, as vLLM did when it started."""
        config = self.vllm_config.load_config
        loader = get_model_loader(config)
        if not isinstance(loader, DefaultModelLoader):
            raise UnsupportedVLLM(
                f"load format {config.load_format!r} has no checkpoint to read",
                next_step="send the names, dtypes and shapes as `specs`",
            )
        weights = loader.get_all_weights(self.vllm_config.model_config, self.model)
        return tuple(
            ParamSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape))
            for name, t in weights
        )

    def checkpoint_names(self) -> frozenset[str]:
        """From the headers of the safetensors files, every name, whatever this rank took."""
        config = self.vllm_config.model_config
        overrides = getattr(self.model, "allow_patterns_overrides", None)
        names: set[str] = set()
        try:
            loader: Any = get_model_loader(self.vllm_config.load_config)
            _, files, *_ = loader._prepare_weights(
                config.model, None, config.revision, False, overrides
            )
            for file in files:
                with safe_open(file, "pt") as opened:
                    names.update(opened.keys())
        # No such method, folder or format (any more): a push is then checked without.
        except (
            AttributeError,
            TypeError,
            ValueError,
            OSError,
            RuntimeError,
            SafetensorError,
        ) as exc:
            init_logger(__name__).debug(
                "weight sync: cannot list the engine's own checkpoint: %s", exc
            )
        return frozenset(names)

    def hook(self, module: nn.Module) -> Hook | None:
        method = getattr(module, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase):
            return None

        def process() -> None:
            method.process_weights_after_loading(module)
            if callable(update := getattr(module, "update_param_tp_status", None)):
                update()

        return process

    def late_hooks(self) -> dict[str, tuple[nn.Module, Hook]]:
        dtype = self.vllm_config.model_config.dtype
        hooks: dict[str, tuple[nn.Module, Hook]] = {
            name: (m, functools.partial(m.process_weights_after_loading, dtype))
            for name, m in self.model.named_modules()
            if is_deferred_attention_layer(m)
        }
        if hasattr(self.model, "process_weights_after_loading"):
            hooks[""] = (self.model, self.model.process_weights_after_loading)  # type: ignore[assignment]
        return hooks

    @contextmanager
    def _active(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(set_current_vllm_config(self.vllm_config))
            stack.enter_context(set_default_torch_dtype(self.vllm_config.model_config.dtype))
            if self.vllm_config.lora_config is not None:
                stack.enter_context(_without_lora(self.model))
            yield

    def context(self) -> AbstractContextManager[object]:
        return self._active()

    def loadable(self, t: torch.Tensor) -> int:
        """Elements that a checkpoint gives: from 0.31 on, loaders declare their padding."""
        return int(getattr(t, "weight_loader_numel", t.numel()))

    def synchronize(self) -> None:
        """Wait until this worker's device has done what was asked of it."""
        if self.device.type != "cpu":
            torch.accelerator.current_stream(self.device).synchronize()


@contextmanager
def _without_lora(model: nn.Module) -> Iterator[None]:
    """LoRA wrappers out of the module tree for a while: loaders know the names without them."""
    from vllm.lora.layers import BaseLayerWithLoRA

    taken: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, BaseLayerWithLoRA):
                taken.append((parent, name, child))
    try:
        for parent, name, child in taken:
            base: Any = child.base_layer
            parent._modules[name] = base
        yield
    finally:
        for parent, name, child in taken:
            parent._modules[name] = child
