"""An `nn.Module` in checkpoint names: what its `save_pretrained` would write, as views of it.

    module → named_state → drop_ties → plan (once, on meta) → Piece → tensors

transformers ≥ 5 fuses experts (and other things) in memory and converts on load and save. Its own
reverse conversion is run on meta tensors: a result that shares storage with a parameter becomes a
view of that parameter, any other (interleave, concatenation, rope permutation) is computed anew
in every pass, from its own parameters only. Nothing here imports transformers.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vllm_wt_plugin.errors import RequestError

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]

_BY_HAND = "push a mapping of checkpoint names to tensors"

# Children under which torch.compile, DDP and activation checkpointing put the wrapped module.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "module")
_PREFIX = re.compile(r"^(?:module\.)+|(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One checkpoint tensor: a strided view of its only source, or (`stride` None) computed.

    `sources` are in-memory names; `offset` counts elements from the start of the source.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    stride: tuple[int, ...] | None = None
    offset: int = 0


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside wrappers that hold exactly one child and no parameters of their own."""
    while len(module._modules) == 1 and not module._parameters and not module._buffers:
        name, inner = next(iter(module._modules.items()))
        if name not in WRAPPED or inner is None:
            break
        module = inner
    return module


def named_state(module: nn.Module) -> dict[str, Any]:
    """Parameters and persistent buffers, wrapper prefixes stripped, tied names still repeated.

    Raises RequestError for FSDP1 and DeepSpeed ZeRO-3 partitions. Only `_extra_state`
    (bookkeeping of TransformerEngine and others, not weights) and what the model class itself
    does not save are left out.
    """
    if any(type(child).__name__ == "FullyShardedDataParallel" for child in module.modules()):
        raise RequestError(
            "FullyShardedDataParallel (FSDP1) hides its parameters in flat buffers",
            next_step="shard with `fully_shard` (FSDP2) or push a mapping of gathered tensors",
        )
    unsaved = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    state: dict[str, Any] = {}
    # keep_vars: tied DTensors and ZeRO-3 shards are recognised by the Parameter object.
    for raw, value in module.state_dict(keep_vars=True).items():
        name = _PREFIX.sub("", raw)
        if name in unsaved or name.rpartition(".")[2] == "_extra_state":
            continue
        if name in state:
            raise RequestError("two tensors have this name once wrappers are stripped", where=name)
        if isinstance(value, Tensor) and getattr(value, "ds_numel", value.numel()) > value.numel():
            raise RequestError(
                "the parameter is partitioned by DeepSpeed ZeRO-3",
                where=name,
                next_step="push inside `deepspeed.zero.GatheredParameters(model.parameters())`",
            )
        state[name] = value
    return state


def drop_ties(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name per tensor: of several, the one that `save_pretrained` keeps, else the first."""
    declared: list[str] = []
    for path, child in module.named_modules():
        keys = getattr(child, "_tied_weights_keys", None) or ()
        declared += [_PREFIX.sub("", f"{path}.{key}" if path else key) for key in keys]
    groups: defaultdict[object, list[str]] = defaultdict(list)
    for name, tensor in state.items():
        groups[_identity(tensor)].append(name)
    dropped: set[str] = set()
    for names in groups.values():
        if len(names) > 1:
            tied = [n for n in sorted(names) if any(re.search(key, n) for key in declared)]
            kept = next((n for n in names if n not in tied), tied[-1] if tied else names[0])
            dropped.update(n for n in names if n != kept)
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def _identity(tensor: Tensor) -> object:
    # Empty tensors, the empty local shards of DTensors and meta tensors all have address 0.
    if tensor.numel() == 0 or tensor.is_meta or is_dtensor(tensor):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(type(tensor), "full_tensor")


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """As `is_dtensor`, for many: they are of few types."""
    return any(hasattr(cls, "full_tensor") for cls in set(map(type, tensors)))


def conversion(module: nn.Module) -> Convert:
    """The function from in-memory to checkpoint tensors: transformers' own, or a small table."""
    # A PreTrainedModel exists only where transformers is imported already.
    modeling = sys.modules.get("transformers.modeling_utils")
    loading = sys.modules.get("transformers.core_model_loading")  # transformers >= 5
    if modeling and loading and isinstance(module, modeling.PreTrainedModel):
        return partial(loading.revert_weight_conversion, _skeleton(module, {}))
    return partial(split_experts, getattr(getattr(module, "config", None), "model_type", None))


def _skeleton(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A tree of the same modules (not copied inside) without wrappers and with plain classes.

    transformers finds conversions by class name and module path; `fully_shard` makes a class
    `FSDPX` of class `X`, which transformers takes for custom code that has no conversions.
    """
    module = unwrap(module)
    if id(module) not in done:
        mro = type(module).__mro__
        plain = next(cls for cls in mro if not cls.__module__.startswith("torch.distributed."))
        twin: nn.Module = object.__new__(plain)
        done[id(module)] = twin
        twin.__dict__.update(module.__dict__)
        twin.__dict__["_modules"] = {
            name: child if child is None else _skeleton(child, done)
            for name, child in module._modules.items()
        }
    return done[id(module)]


class _Views(TorchFunctionMode):
    """Makes `contiguous()` return its input, so that views stay views, and notes for every new
    storage from which named tensors it was made. Storages are kept alive while it notes."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._kept: list[Tensor] = list(named.values())
        self.origin = {_storage(tensor): frozenset((name,)) for name, tensor in named.items()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.contiguous:
            return args[0]
        result = func(*args, **(kwargs or {}))
        given = [_storage(tensor) for tensor in _tensors((args, kwargs))]
        origin = frozenset[str]().union(*(self.origin.get(key, ()) for key in given))
        for tensor in _tensors(result):
            if _storage(tensor) not in self.origin:
                self.origin[_storage(tensor)] = origin
                self._kept.append(tensor)
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _converted(convert: Convert, tensors: dict[str, Tensor], views: _Views) -> dict[str, Tensor]:
    try:
        with torch.no_grad(), views:
            return convert(tensors)
    except (AttributeError, KeyError, RuntimeError, ValueError) as exc:
        raise RequestError(
            f"the model's tensors cannot be brought to checkpoint form: {exc}",
            where=f"{next(iter(tensors), '')} …",
            next_step=_BY_HAND,
        ) from exc


def plan(convert: Convert, state: Mapping[str, Tensor]) -> tuple[Piece, ...]:
    """How to make every checkpoint tensor from `state`; touches no data and moves nothing."""
    metas = {name: _meta(tensor) for name, tensor in state.items()}
    owners = {_storage(meta): name for name, meta in metas.items()}
    views = _Views(metas)
    pieces = []
    for name, tensor in _converted(convert, dict(metas), views).items():
        owner = owners.get(_storage(tensor))
        view = owner is not None and tensor.dtype == metas[owner].dtype
        pieces.append(
            Piece(
                name=name,
                dtype=tensor.dtype,
                shape=tuple(tensor.shape),
                sources=tuple(sorted(views.origin.get(_storage(tensor), ()))),
                stride=tensor.stride() if view else None,
                offset=int(tensor.storage_offset()),
            )
        )
    return tuple(pieces)


def _meta(tensor: Tensor) -> Tensor:
    shape = tuple(tensor.shape)
    if is_dtensor(tensor):  # gathered, it is contiguous
        return torch.empty(shape, dtype=tensor.dtype, device="meta")
    return torch.empty_strided(shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def tensors(
    pieces: Iterable[Piece],
    state: Mapping[str, Tensor],
    convert: Convert,
    gather: Callable[[Tensor], Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Each piece in turn. `gather` makes a whole, detached tensor; it is called once per run of
    pieces with the same sources, so one gathered group is held at a time."""
    sources: tuple[str, ...] | None = None
    whole: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for piece in pieces:
        if piece.sources != sources:
            sources, whole, made = piece.sources, {}, {}
            whole = {name: gather(state[name]) for name in piece.sources}
        if piece.stride is not None:
            base = whole[piece.sources[0]]
            start = int(base.storage_offset()) + piece.offset
            yield piece.name, base.as_strided(piece.shape, piece.stride, start)
            continue
        made = made or _converted(convert, dict(whole), _Views({}))
        if piece.name not in made:
            raise RequestError(
                f"converting {', '.join(piece.sources)} alone did not give this tensor",
                where=piece.name,
                next_step=_BY_HAND,
            )
        yield piece.name, made[piece.name]


# Model type → name of the expert block and of its projections in checkpoints.
_PLAIN = ("mlp", ("gate_proj", "up_proj"), ("down_proj",))
_MIXTRAL = ("block_sparse_moe", ("w1", "w3"), ("w2",))
_BLOCKS = {"minimax": _MIXTRAL, "minimax_m2": _MIXTRAL, "mixtral": _MIXTRAL}


def split_experts(model_type: str | None, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Split `….experts.gate_up_proj` [E, 2I, H] and `….down_proj` [E, H, I] by expert, as views.

    For modules without transformers' own mapping. Pairs of other shapes (transposed, as in
    GPT-OSS and Llama 4) or with biases are fused in their checkpoints too and pass unchanged.
    """
    block, gate_up, down = _BLOCKS.get(model_type or "", _PLAIN)
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj") or not _is_fused(stem, state):
            result[name.replace(".mlp.", f".{block}.")] = tensor
            continue
        stem = stem.replace(".mlp.", f".{block}.")
        projections = gate_up if leaf == "gate_up_proj" else down
        parts = tensor.chunk(len(projections), dim=1)
        for projection, part in zip(projections, parts, strict=True):
            for index, expert in enumerate(part.unbind(0)):
                result[f"{stem}.{index}.{projection}.weight"] = expert
    return result


def _is_fused(stem: str, state: Mapping[str, Tensor]) -> bool:
    gate_up, down = state.get(f"{stem}.gate_up_proj"), state.get(f"{stem}.down_proj")
    if gate_up is None or down is None or gate_up.ndim != 3 or down.ndim != 3:
        return False
    if not stem.endswith("mlp.experts") or f"{stem}.gate_up_proj_bias" in state:
        return False
    experts, hidden, inner = down.shape
    return tuple(gate_up.shape) == (experts, 2 * inner, hidden)
