"""Is the recording true? The loader runs once more, for real, on values that name themselves.

Each checkpoint tensor gets values made from its name and the element's place; what the loader
makes of them in scratch tensors must equal what the recorded segments make of them, bit for bit.
Layers that were recorded alike (same names, shapes and regions but for the layer's number) took
the same path through the loader and are run once. Host memory only: one layer at a time.
"""

from __future__ import annotations

import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from vllm_wt_plugin.errors import PlanError
from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.blueprint import TensorForm, tensors_of_module
from vllm_wt_plugin.worker.plan.host import Host
from vllm_wt_plugin.worker.plan.record import Recording, Writes, Written
from vllm_wt_plugin.worker.plan.segment import Segment, source_view

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def disagreements(host: Host, specs: Mapping[str, ParamSpec], rec: Recording) -> dict[str, str]:
    """Modules for which the loader and the recording differ: {module: why}. Blocking, CPU."""
    opaque = {module for module, _ in rec.opaque_targets}
    by_name: dict[str, list[Segment]] = defaultdict(list)
    for seg in rec.segments:
        if seg.target[0] not in opaque and seg.name not in rec.opaque_names:
            by_name[seg.name].append(seg)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in by_name:
        layer = _LAYER.search(name)
        groups[name[: layer.end()] if layer else name.rpartition(".")[0]].append(name)
    seen: set[object] = set()
    wrong: dict[str, str] = {}
    for prefix, names in groups.items():
        signature = _signature(prefix, names, by_name, specs)
        if signature in seen:
            continue
        segments = [s for n in names for s in by_name[n]]
        with _threads(host.device):
            found = _compare(host, rec, [specs[n] for n in names], segments)
        if found:
            wrong |= found  # and so may every other layer be
        else:
            seen.add(signature)
    return wrong


@contextmanager
def _threads(device: torch.device) -> Iterator[None]:
    """vLLM leaves its GPU workers one CPU thread; this one time the host has work to do."""
    if device.type == "cpu":
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(before, (os.cpu_count() or 1) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _signature(
    prefix: str,
    names: list[str],
    segments: Mapping[str, list[Segment]],
    specs: Mapping[str, ParamSpec],
) -> object:
    plain = prefix.rpartition(".")[0] if _LAYER.search(prefix + ".") else prefix

    def mask(text: str) -> str:
        return _LAYER.sub("#", text + ".", count=1)

    return plain, tuple(
        (
            mask(n),
            specs[n].dtype,
            specs[n].shape,
            tuple((s.source, mask(s.target[0]), s.target[1], s.dest) for s in segments[n]),
        )
        for n in names
    )


def _compare(
    host: Host, rec: Recording, specs: list[ParamSpec], segments: list[Segment]
) -> dict[str, str]:
    modules = {host.model.get_submodule(s.target[0]): s.target[0] for s in segments}
    coded = {s.name: _coded(s) for s in specs}

    forms = [f for m in modules if (f := host.blueprint.form(m)) is not None]
    keys = {f.key for form in forms for f in form.tensors.values()}

    def make(module: nn.Module, tensor: str, form: TensorForm) -> torch.Tensor:
        if form.key not in keys:
            return form.empty("meta")
        t = form.empty("cpu")
        _bytes(t).fill_(0x5A)
        return t

    with torch.no_grad(), host.context():
        with host.blueprint.checkpoint_form(host.model, make):
            try:
                host.load(list(coded.items()))
            # Foreign code: whatever it raises on real tensors, the recording is not to be trusted.
            except Exception as exc:
                return dict.fromkeys(modules.values(), f"the loader raised {exc!r}"[:300])
            made = {n: tensors_of_module(m) for m, n in modules.items()}
        expected = {
            n: {t: _like(real) for t, real in tensors.items()} for n, tensors in made.items()
        }
        for fill in rec.fills:
            if fill.target[0] in expected:
                dest = expected[fill.target[0]][fill.target[1]]
                fill.dest.of_tensor(dest).fill_(fill.value)
        for seg in segments:
            dest = expected[seg.target[0]][seg.target[1]]
            seg.dest.of_tensor(dest).copy_(source_view(coded[seg.name], seg.source))
    return {
        name: f"{t}: coded values end elsewhere than recorded"
        for name, t in dict.fromkeys(s.target for s in segments)
        if not _equal(made[name][t], expected[name][t])
    }


def _coded(spec: ParamSpec) -> torch.Tensor:
    """Small whole numbers, exact in every float type, from the name and the element's place."""
    dtype = getattr(torch, spec.dtype)
    g = torch.Generator().manual_seed(zlib.crc32(spec.name.encode()))
    work = dtype if dtype.itemsize > 1 else torch.uint8
    dims = len(spec.shape)
    # The sum over the dimensions stays exact (bf16: 256, and fp8 as bytes below its NaNs).
    most = (256 if dtype.itemsize > 1 else 112) // max(dims, 1)
    out = torch.randint(0, most, (1,) * dims, generator=g).to(work)
    for dim, n in enumerate(spec.shape):
        code = torch.randint(0, most, (n,), generator=g).to(work)
        own = code.view([-1 if d == dim else 1 for d in range(dims)])
        out = own if dim == 0 else out + own
    return out.to(dtype) if dtype.itemsize > 1 or dtype == torch.bool else out.view(dtype)


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage())


def _like(t: torch.Tensor) -> torch.Tensor:
    out = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype)
    _bytes(out).fill_(0x5A)
    return out


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def rehearse(host: Host, modules: Iterable[str], specs: list[ParamSpec]) -> list[Written]:
    """Run the loader for the names that could not be recorded, on zeros in scratch tensors.

    Returns what it writes of `modules`. Raises PlanError with the loader's words: better now than
    when half of the weights are new.
    """
    names = set(modules)
    forms = [host.blueprint.form(host.model.get_submodule(n)) for n in names]
    real = {f.key for form in forms if form is not None for f in form.tensors.values()}
    at = specs[0]

    def feed() -> Iterable[tuple[str, torch.Tensor]]:
        nonlocal at
        for at in specs:
            yield at.name, torch.zeros(at.shape, dtype=getattr(torch, at.dtype))

    def make(module: nn.Module, tensor: str, form: TensorForm) -> torch.Tensor:
        return form.empty("cpu" if form.key in real else "meta")

    with (
        torch.no_grad(),
        host.context(),
        host.blueprint.checkpoint_form(host.model, make),
    ):
        writes = Writes(host.model)
        try:
            with writes:
                host.load(feed())
        except Exception as exc:
            why = f"{type(exc).__name__}: {exc}".strip(": ")
            raise PlanError(
                f"the model's loader does not take {at.name} "
                f"with shape {tuple(at.shape)} and dtype {at.dtype} ({why})"[:1000],
                where=at.name,
                next_step="compare names and shapes with the served model's checkpoint",
            ) from exc
    return [w for w in writes.found if w[0][0] in names]
