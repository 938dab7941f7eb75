"""vLLM's post-load processing, seen from outside: does it read a weight, and run it again.

`probe` tells whether computing the live form reads a module's weights. `install` runs it again
on new weights, from the state a fresh load starts in, and moves what it made into the memory the
running engine already uses (captured CUDA graphs hold those addresses).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_wt_plugin.errors import TransferError
from vllm_wt_plugin.worker.plan.blueprint import (
    REGISTRIES,
    Blueprint,
    processor_of,
    tensors_of_module,
)
from vllm_wt_plugin.worker.plan.host import Hook
from vllm_wt_plugin.worker.plan.ops import is_view, storage_key, tensors_of, written_by

aten = torch.ops.aten


class _Reads(TorchDispatchMode):
    """Which watched storages are read or written by anything but a view or a no-op copy.

    What is written is kept, for `restore`.
    """

    def __init__(self, watched: dict[int, set[str]], stop_at: str | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched, self.stop_at = watched, stop_at
        self.found: dict[str, str] = {}  # module → operation
        self._old: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # memory, its bytes before

    def touch(self, func: Any, args: Any) -> None:
        for t in tensors_of(args):
            for module in self.watched.get(storage_key(t), ()):
                self.found.setdefault(module, str(func))
                if module == self.stop_at:
                    raise _Touched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.copy_.default and _same(args[0], args[1]):
            return args[0]
        if not is_view(func):
            self.touch(func, (args, kwargs))
        for t in written_by(func, args, kwargs):
            if storage_key(t) in self.watched and storage_key(t) not in self._old:
                memory = torch.empty(0, dtype=torch.uint8, device=t.device)
                memory.set_(t.untyped_storage())
                self._old[storage_key(t)] = memory, memory.clone()
        return func(*args, **kwargs)

    def restore(self) -> None:
        for memory, before in self._old.values():
            memory.copy_(before)


class _Calls(TorchFunctionMode):
    """The same for vLLM's own operators that have no dispatch key (its CPU ones): those run
    without passing the dispatch mode."""

    def __init__(self, reads: _Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverloadPacket | torch._ops.OpOverload):
            self.reads.touch(func, (args, kwargs))
        return func(*args, **(kwargs or {}))


class _Touched(Exception):
    """Stops a probe before the operation runs: nothing of the live model is read or written."""


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        storage_key(a) == storage_key(b)
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.dtype == b.dtype
    )


def probe(
    name: str,
    module: nn.Module,
    blueprint: Blueprint,
    hook: Hook,
    watched: dict[int, set[str]],
) -> dict[str, str]:
    """Modules whose weights `hook` touches when it starts from a fresh load's state: {module: op}.

    `watched` maps live storages to module names. Stops at the first touch of `name`'s own; then
    only that entry is certain. The module is as before afterwards.
    """
    live = tensors_of_module(module)
    form = blueprint.form(module)
    missing = {} if form is None else {n: f for n, f in form.tensors.items() if n not in live}
    tensors = live | {n: f.empty(_device(live)) for n, f in missing.items()}
    mode = _Reads(watched, stop_at=name)
    processor = processor_of(module)
    with torch.no_grad(), blueprint.module_form(module, tensors):
        start = dict(module.__dict__)
        start_p = {} if processor is None else dict(vars(processor))
        try:
            with mode, _Calls(mode):
                hook()
        except _Touched:
            return mode.found
        finally:
            mode.restore()
        after = tensors_of_module(module)
        made = [changed(start, module.__dict__)]
        made += [changed(start_p, vars(processor))] if processor is not None else []
        for n, t in live.items():
            now = after.get(n)
            if now is None or not _same(now, t):
                mode.found[name] = f"{n} is replaced"
        if _hides_weights(made, watched):
            mode.found.setdefault(name, "it makes tensors or handles of its own")
    return mode.found


def _hides_weights(tree: Any, watched: dict[int, set[str]]) -> bool:
    """Could what a hook made hold weights by a way that no operator showed?"""
    return any(
        hasattr(x, "__del__")
        or (isinstance(x, torch.Tensor) and x.numel() > 0 and storage_key(x) not in watched)
        for x in _reachable(tree)
    )


def made_by_processing(module: nn.Module, blueprint: Blueprint) -> Iterator[torch.Tensor]:
    """Tensors that are reached through what became of a module's, or its processor's, attributes
    since it was built: packed weights in a closure are read where no parameter is."""
    if (form := blueprint.form(module)) is None:
        return
    now = [changed(form.attrs, module.__dict__)]
    if (processor := processor_of(module)) is not None:
        now.append(changed(form.processor_attrs or {}, vars(processor)))
    yield from (x for x in _reachable(now) if isinstance(x, torch.Tensor))


def _reachable(tree: Any) -> Iterator[Any]:
    """Objects that `tree` holds, itself included; modules and classes are not entered."""
    todo, seen = [tree], {id(tree): tree}
    while todo:
        x = todo.pop()
        yield x
        for part in () if isinstance(x, torch.Tensor) else _parts(x).values():
            if id(part) not in seen and not isinstance(part, (nn.Module, type)):
                seen[id(part)] = part
                todo.append(part)


def trace(hook: Hook, module: nn.Module, watched: dict[int, set[str]]) -> dict[str, str]:
    """As `probe`, for a hook that runs on the live model (attention, the model's own)."""
    mode = _Reads(watched, stop_at=None)
    with torch.no_grad(), _kept_attributes(module):
        try:
            with mode, _Calls(mode):
                hook()
        finally:
            mode.restore()
    return mode.found


@contextmanager
def _kept_attributes(module: nn.Module) -> Iterator[None]:
    """Attributes a hook rebinds are bound back to the objects the engine has captured."""
    saved = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attrs, params, buffers in saved:
            m.__dict__.clear()
            m.__dict__.update(attrs)
            m._parameters.clear()
            m._parameters.update(params)
            m._buffers.clear()
            m._buffers.update(buffers)


def install(
    name: str,
    module: nn.Module,
    blueprint: Blueprint,
    hook: Hook | None,
    tensors: dict[str, torch.Tensor],
    attrs_loaded: dict[str, Any],
) -> None:
    """Make `tensors` (checkpoint form, real memory, ours) the weights of one live module.

    `attrs_loaded`: plain attributes its loader has set. Parameters that only loading makes
    (the bias of transformers' heads) are in `tensors` and in no form.
    """
    live = tensors_of_module(module)
    form = blueprint.form(module)
    extra = {n: t for n, t in tensors.items() if form is None or n not in form.tensors}
    processor = processor_of(module)
    with torch.no_grad():
        with blueprint.module_form(module, dict(tensors)):
            start = dict(module.__dict__)
            start_p = {} if processor is None else dict(vars(processor))
            module.__dict__.update(attrs_loaded)
            module._parameters.update(extra)  # type: ignore[arg-type]
            if hook is not None:
                hook()
            made, children = tensors_of_module(module), dict(module._modules)
            attrs = changed(start, module.__dict__)
            attrs_p = {} if processor is None else changed(start_p, vars(processor))
        _overwrite(name, {n: (old, made[n]) for n, old in live.items() if n in made})
        module._parameters.update({n: made[n] for n in extra if n not in live})  # type: ignore[misc]
        _transplant(module._modules, children)
        _transplant(module.__dict__, attrs)
        if processor is not None:
            _transplant(vars(processor), attrs_p)


def rerun(name: str, module: nn.Module, hook: Hook) -> None:
    """Run a hook that derives tensors from other modules; keep the storage they live in."""
    before: dict[nn.Module, tuple[dict[str, Any], ...]] = {
        m: (dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in module.modules()
    }
    with torch.no_grad():
        hook()
        for m, (old, *registries) in before.items():
            new = changed(old, m.__dict__)
            m.__dict__.update({k: old[k] for k in new if k in old})
            _transplant(m.__dict__, new)
            current: list[dict[str, Any]] = [m._parameters, m._buffers]
            for now, kept in zip(current, registries, strict=True):
                again = {n: (t, now[n]) for n, t in kept.items()
                         if t is not None and now.get(n) is not None}  # fmt: skip
                _overwrite(name, again)
                now.update({n: t for n, (t, _) in again.items()})


def changed(start: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    new = [k for k, v in now.items() if k not in start or start[k] is not v]
    return {k: now[k] for k in new if k not in REGISTRIES}


def _overwrite(module: str, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give each first tensor, in its own memory, the values of the second."""
    alike = []
    for name, (old, new) in pairs.items():
        if new is old:
            continue
        if old.shape == new.shape and old.dtype == new.dtype:
            alike.append((old.data, new.data))
        elif old.device.type == "cpu":
            old.data = new.data
        else:
            raise TransferError(
                f"processing made {tuple(new.shape)} {new.dtype}, the engine runs on "
                f"{tuple(old.shape)} {old.dtype} at a captured address",
                where=f"{module}.{name}",
                next_step="restart the engine with the new checkpoint",
            )
    if alike:  # one call: a layer's few small tensors cost what their calls do
        torch._foreach_copy_([old for old, _ in alike], [new for _, new in alike])


def _transplant(live: dict[str, Any], made: Mapping[str, Any]) -> None:
    """Move what processing made into `live`: into the same memory where there is one."""
    for key, new in made.items():
        if key not in live or not _pour(live[key], new, {}):
            live[key] = new


def _pour(old: Any, new: Any, seen: dict[int, Any]) -> bool:
    """Copy `new`'s tensors into `old`'s. False, with `old` untouched or to be dropped, where the
    two do not have the same structure down to the last value. `seen`: what went into what."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, (bool, int, float, complex, str, bytes, set, torch.dtype, torch.device)):
        return bool(old == new)
    if id(old) in seen:
        return seen[id(old)] is new
    seen[id(old)] = new
    if isinstance(old, torch.Tensor):
        if old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
            return False
        old.data.copy_(new)
        return True
    if isinstance(old, types.FunctionType) and old.__code__ is not new.__code__:
        return False
    # An object with a finaliser owns something outside Python: vLLM's oneDNN handler keeps a
    # pointer in an int64 tensor, and copying that would leave two owners of one allocation.
    if hasattr(old, "__del__"):
        return False
    a, b = _parts(old), _parts(new)
    known = bool(a) or isinstance(old, (dict, list, tuple))
    return known and a.keys() == b.keys() and all(_pour(a[k], b[k], seen) for k in a)


def _parts(x: Any) -> dict[Any, Any]:
    """What an object holds: items, captured variables, bound arguments, attributes."""
    if isinstance(x, (list, tuple)):
        return dict(enumerate(x))
    if isinstance(x, dict):
        return x
    if isinstance(x, types.FunctionType):
        given = *(x.__closure__ or ()), *(x.__defaults__ or ())
        return {**dict(enumerate(given)), **(x.__kwdefaults__ or {})}
    if isinstance(x, types.CellType):
        try:
            return {"cell": x.cell_contents}
        except ValueError:  # not filled yet
            return {}
    if isinstance(x, types.MethodType):
        return {"func": x.__func__, "self": x.__self__}
    if isinstance(x, functools.partial):
        return {"func": x.func, **dict(enumerate(x.args)), **x.keywords}
    return vars(x) if hasattr(x, "__dict__") and not isinstance(x, type) else {}


def _device(live: dict[str, torch.Tensor]) -> torch.device:
    return next((t.device for t in live.values()), torch.device("cpu"))
