"""What a trainer pushes: tensors under checkpoint names, from wherever the trainer holds them.

    as_source(module | mapping | pairs | folder) → Source → specs() and passes of (name, tensor)

A source owns no tensor and copies none, but for the exceptions named in `fused`: what it yields
is the trainer's memory (or the mapped file), to be read before the trainer writes it again.
With sharded tensors (FSDP2, tensor parallel) a pass is a collective: all ranks iterate together.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vllm_wt_plugin.errors import RequestError
from vllm_wt_plugin.trainer import fused
from vllm_wt_plugin.wire.params import ParamSpec, itemsize

_ADAPTER = re.compile(r"(?:^|\.)(?:base_layer|lora_\w+|modules_to_save|original_module)(?:\.|$)")
INDEX = "model.safetensors.index.json"

# safetensors' dtype names, where they are not torch's.
DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "BF16": "bfloat16",
    "F16": "float16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "F64": "float64",
}


@runtime_checkable
class Source(Protocol):
    """Checkpoint tensors: `specs()` describes, without materialising anything, what every pass
    yields, in that order. Tensors are detached, whole (not shards) and on any one device."""

    def specs(self) -> tuple[ParamSpec, ...]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


def as_source(obj: object) -> Source:
    """A Source for a module, a mapping name → tensor, (name, tensor) pairs or a checkpoint folder.

    Modules and mappings are read anew in every pass. Pairs are consumed here, once, into a dict:
    later passes see the same tensors (and in-place changes to them). A Source is returned as is.
    Raises RequestError for anything else and for tensors that cannot be sent.
    """
    if isinstance(obj, nn.Module):
        return ModuleSource(obj)
    if isinstance(obj, Mapping):
        return MappingSource(obj)
    if isinstance(obj, (str, os.PathLike)):
        return FolderSource(Path(os.fsdecode(obj)))
    if isinstance(obj, Source):
        return obj
    if isinstance(obj, Iterable) and not isinstance(obj, (Tensor, bytes)):
        return MappingSource(_pairs(obj))
    raise RequestError(
        f"cannot take weights from a {type(obj).__name__}",
        next_step="pass an nn.Module, a mapping of names to tensors, (name, tensor) pairs, the "
        "path of a folder with *.safetensors, or a Source",
    )


def _pairs(items: Iterable[object]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for index, item in enumerate(items):
        if not isinstance(item, (tuple, list)) or len(item) != 2 or not isinstance(item[0], str):
            raise RequestError(
                f"expected a (name, tensor) pair, got a {type(item).__name__}",
                where=f"item {index}",
                next_step="yield pairs as `model.named_parameters()` does",
            )
        if item[0] in result:
            raise RequestError("the same name is given twice", where=item[0])
        result[item[0]] = item[1]
    return result


def _check(name: object, value: object) -> Tensor:
    """The value, if it is a tensor whose bytes can be sent under this name."""
    if not isinstance(name, str) or not name:
        raise RequestError(f"a name must be a non-empty string, got {name!r}", where=repr(name))
    if not isinstance(value, Tensor):
        raise RequestError(f"a {type(value).__name__} is not a tensor", where=name)
    if value.layout is not torch.strided or value.is_nested:
        raise RequestError(
            f"a tensor of layout {value.layout} cannot be sent", where=name, next_step="densify it"
        )
    if value.device.type == "meta":
        raise RequestError(
            "the tensor is on the meta device and has no data",
            where=name,
            next_step="materialise the model first; a model offloaded by accelerate must be loaded",
        )
    if hasattr(value, "__tensor_flatten__") and not fused.is_dtensor(value):
        raise RequestError(
            f"a {type(value).__name__} has no plain bytes",
            where=name,
            next_step="dequantise it, or push its inner tensors under checkpoint names",
        )
    itemsize(_dtype_name(value.dtype), name)
    return value


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _whole(tensor: Tensor) -> Tensor:
    """Detached; a DTensor is gathered (collective)."""
    tensor = tensor.detach()
    if not fused.is_dtensor(tensor):
        return tensor
    full: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return full.contiguous()


def _refuse_adapters(names: Iterable[str]) -> None:
    """Base weights without their adapter are silently wrong, so refuse both."""
    for name in names:
        if _ADAPTER.search(name):
            raise RequestError(
                "an adapter (PEFT, LoRA) is not merged into the weights",
                where=name,
                next_step="push `model.merge_and_unload()` or a merged checkpoint",
            )


def fingerprint(source: Source) -> list[tuple[object, ...]] | None:
    """Where the source's tensors are, cheaply: equal twice means that every view of them is as it
    was (while the caller keeps `memory()`'s tensors alive). None: iterate to know.
    """
    tensors = getattr(source, "memory", lambda: None)()
    if tensors is None:
        return None
    return [(id(t), t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


def gathers(source: Source) -> bool:
    """Do tensors come into being as the source is iterated (sharded ones, as a collective)?"""
    return bool(getattr(source, "gathers", False))


def device_of(source: Source) -> torch.device:
    """Where the source's tensors are; sharded ones are gathered on their shards' device."""
    device = getattr(source, "device", None)
    if device is None:
        device = next((t.device for _, t in source), torch.device("cpu"))
    return torch.device(device)


class MappingSource:
    """The tensors of a mapping, under its own names and in its order."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._mapping = mapping
        self.specs()  # so that what cannot be sent is refused here

    def specs(self) -> tuple[ParamSpec, ...]:
        return tuple(
            ParamSpec(name, _dtype_name(_check(name, value).dtype), tuple(value.shape))
            for name, value in self._mapping.items()
        )

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self._mapping.items():
            yield name, _whole(_check(name, value))

    @property
    def gathers(self) -> bool:
        return fused.any_dtensor(self._mapping.values())

    @property
    def device(self) -> torch.device:
        return next((v.device for v in self._mapping.values()), torch.device("cpu"))

    def memory(self) -> list[Tensor] | None:
        """The tensors themselves; None where iteration gathers."""
        values = list(self._mapping.values())
        return None if fused.any_dtensor(values) else values


_Tree = list[tuple[nn.Module, tuple[nn.Module | None, ...]]]  # each module with its children


class ModuleSource:
    """What the module's `save_pretrained` would write, as views of its parameters and buffers.

    The layout is planned once and again when the module's names, shapes or strides change.
    Raises RequestError for adapters, meta or partitioned parameters.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = fused.unwrap(module)
        self._layout: list[tuple[object, ...]] | None = None
        self._pieces: tuple[fused.Piece, ...] = ()
        self._computes = False  # some piece is no view
        self._tree: _Tree = []
        self.specs()  # so that what cannot be sent is refused here

    def specs(self) -> tuple[ParamSpec, ...]:
        self._state()
        return tuple(ParamSpec(p.name, _dtype_name(p.dtype), p.shape) for p in self._pieces)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        state = self._state()
        return fused.tensors(self._pieces, state, fused.conversion(self._module), _whole)

    @property
    def gathers(self) -> bool:
        return fused.any_dtensor(self._own())

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self._own()), torch.device("cpu"))

    def _own(self) -> list[Tensor]:
        """Every tensor of the module tree. The tree is walked again only where it has changed:
        `Module.modules()` takes 2 ms for 800 modules, once for every push."""
        held = _held(self._tree) if self._tree else None
        while held is None:
            self._tree = [(m, tuple(m._modules.values())) for m in self._module.modules()]
            held = _held(self._tree)
        return [t for t in held if t is not None]

    def memory(self) -> list[Tensor] | None:
        """Every tensor of the module tree; None where iteration gathers or computes."""
        own = self._own()
        return None if self._computes or fused.any_dtensor(own) else own

    def _state(self) -> dict[str, Tensor]:
        named = fused.named_state(self._module)
        _refuse_adapters(named)
        state = fused.drop_ties(self._module, {n: _check(n, v) for n, v in named.items()})
        layout: list[tuple[object, ...]] = [
            (name, t.dtype, t.shape, t.stride()) for name, t in state.items()
        ]
        if layout != self._layout:
            self._pieces = fused.plan(fused.conversion(self._module), state)
            self._computes = any(p.stride is None for p in self._pieces)
            self._layout = layout
        return state


def _held(tree: _Tree) -> list[Tensor | None] | None:
    """Parameters and buffers of a module tree; None if it has changed. Out of each `__dict__`:
    attributes of modules take twice as long, and most modules have neither children nor buffers."""
    out: list[Tensor | None] = []
    for module, children in tree:
        has = module.__dict__
        if (has["_modules"] or children) and tuple(has["_modules"].values()) != children:
            return None
        if has["_parameters"]:
            out += has["_parameters"].values()
        if has["_buffers"]:
            out += has["_buffers"].values()
    return out


class FolderSource:
    """The tensors of a folder's *.safetensors files, memory-mapped, on the CPU.

    With `model.safetensors.index.json` its names and files, else every file. Headers are read
    here, once: the folder must not change while the source lives.
    """

    def __init__(self, folder: Path) -> None:
        self._files = {file: _header(file, names) for file, names in _files(folder).items()}
        counts = Counter(spec.name for spec in self.specs())
        _refuse_adapters(counts)
        for name, count in counts.items():
            if count > 1:
                raise RequestError(
                    f"{count} files of the folder hold this name",
                    where=f"{name} in {folder}",
                    next_step=f"keep one of them, or add {INDEX}",
                )

    def specs(self) -> tuple[ParamSpec, ...]:
        return tuple(spec for header in self._files.values() for spec in header)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file, header in self._files.items():
            with _reading(file) as reader:
                for spec in header:
                    yield spec.name, reader.get_tensor(spec.name)


def _bad_folder(what: str, where: Path) -> RequestError:
    step = "pass a folder that `save_pretrained` wrote or the Hub delivered, with *.safetensors"
    return RequestError(what, where=str(where), next_step=step)


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Every file to read, with the names that the index gives it (None: all that it holds)."""
    if not folder.is_dir():
        raise _bad_folder("there is no such checkpoint folder", folder)
    if not (folder / INDEX).is_file():
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise _bad_folder("the folder holds no *.safetensors file", folder)
        return dict.fromkeys(found)
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        entries = sorted((str(file), str(name)) for name, file in weight_map.items())
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise _bad_folder(f"the index has no readable weight_map: {exc!r}", folder / INDEX) from exc
    files: dict[Path, set[str] | None] = {}
    for file, name in entries:
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise _bad_folder(f"the index names {file!r}, not a file of the folder", folder / INDEX)
        names = files[path] = files.get(path) or set()
        names.add(name)
    return files


def _header(file: Path, names: set[str] | None) -> list[ParamSpec]:
    with _reading(file) as reader:
        held = list(reader.keys())
        if names is not None and (missing := names.difference(held)):
            raise _bad_folder(f"the index promises {min(missing)!r}, which is not there", file)
        specs = []
        for name in held if names is None else sorted(names):
            view = reader.get_slice(name)
            dtype = DTYPES.get(view.get_dtype(), view.get_dtype())
            itemsize(dtype, f"{name} in {file}")
            specs.append(ParamSpec(name, dtype, tuple(view.get_shape())))
        return specs


@contextmanager
def _reading(file: Path) -> Iterator[Any]:
    try:
        library = importlib.import_module("safetensors")
    except ImportError:
        raise RequestError(
            "reading a checkpoint folder needs the `safetensors` package",
            where=str(file),
            next_step="pip install safetensors",
        ) from None
    try:
        with library.safe_open(file, framework="pt", device="cpu") as reader:
            yield reader
    except (OSError, library.SafetensorError) as exc:
        raise _bad_folder(f"the file cannot be read: {exc}", file) from exc
