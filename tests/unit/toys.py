"""Toy models, loaders and post-load processing in vLLM's style, and a `Host` for them.

    build → Blueprint → load_weights → retie → layers' hooks → late hooks        (as vLLM does)

`fresh(kind, seed)` is a toy loaded from its checkpoint of that seed: what an update from another
checkpoint must end in, bit for bit. Sizes differ on purpose: a wrong transposition cannot keep a
shape. Nothing here imports vLLM.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from vllm_wt_plugin.wire.params import ParamSpec
from vllm_wt_plugin.worker.plan.blueprint import Blueprint
from vllm_wt_plugin.worker.plan.host import Hook

Weights = Iterable[tuple[str, torch.Tensor]]
Shapes = dict[str, tuple[int, ...]]
BF16 = torch.bfloat16


def param(*shape: int, dtype: torch.dtype = torch.float32, **attrs: Any) -> nn.Parameter:
    """A parameter as vLLM makes them: uninitialised, without gradient, with loader attributes.
    NaN where torch would leave whatever the memory held."""
    t = torch.full(shape, float("nan"), dtype=dtype) if dtype.is_floating_point else None
    p = nn.Parameter(torch.zeros(shape, dtype=dtype) if t is None else t, requires_grad=False)
    p.__dict__.update(attrs)
    return p


def copy_loader(p: torch.Tensor, w: torch.Tensor) -> None:
    """vLLM's `default_weight_loader`."""
    if p.shape != w.shape:
        raise ValueError(f"Attempted to load weight ({tuple(w.shape)}) into {tuple(p.shape)}")
    p.data.copy_(w)


# ---- post-load processing (vLLM's quant methods) ------------------------------------------


class Plain:
    """vLLM's unquantised method on a GPU: nothing to do, though it makes a new Parameter."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, layer.weight.to(x.dtype), getattr(layer, "bias", None))


class PackKeep(Plain):
    """vLLM's CPU packing of embeddings: computes from a closure, the weight stays, unread."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed = layer.weight.float().t().contiguous() * 2
        layer.cpu_linear = lambda x: x @ packed

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer.cpu_linear(x)


class PackEmpty(PackKeep):
    """vLLM's CPU packing of linear layers: the weight becomes an empty tensor."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        super().process_weights_after_loading(layer)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class PackDrop(PackKeep):
    """Packs into an attribute and removes the parameter."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = [layer.weight.float().t().contiguous(), {"times": 2}]
        layer.cpu_linear = functools.partial(torch.matmul, other=layer.packed[0] * 2)
        del layer.weight

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer.cpu_linear(x)


class Quantise(Plain):
    """Online int8: the weight becomes another Parameter, and a scale is made."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        scale = layer.weight.float().abs().amax(1, keepdim=True) / 127
        q = (layer.weight.float() / scale).round().to(torch.int8)
        layer.weight = nn.Parameter(q, requires_grad=False)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ (layer.weight.float() * layer.weight_scale).t()


class Transpose(Plain):
    """A relayout into a new Parameter of another shape."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.weight.to(x.dtype)


class TransposeView(Transpose):
    """The same without a copy: the live weight is a view of the loaded one."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight = nn.Parameter(layer.weight.data.t(), requires_grad=False)


class Child(Plain):
    """The live form is a module of its own, registered before the weight is read."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.child = nn.Module()
        layer.child.weight = nn.Parameter(layer.weight.t().contiguous(), requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.child.weight


class InPlace(Plain):
    """Scales the loaded weight where it lies: running it twice is wrong."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.data.mul_(2)


class Kernel:
    def __init__(self, weight: torch.Tensor, flag: bool, sign: bool) -> None:
        self.flag, self.sign, self.weight = flag, sign, weight.float().t().contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight) * (1 if self.flag else -1) * (1 if self.sign else -1)


class Stateful(Plain):
    """vLLM's MoE on CPU: the second run of the same processor takes another path."""

    def __init__(self) -> None:
        self.moe_kernel: Kernel | None = None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if self.moe_kernel is not None:
            layer.weight.data.zero_()
            return
        self.moe_kernel = Kernel(layer.weight, True, bool(layer.weight.float().sum() > 0))
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.moe_kernel(x)


class Heap:
    """Memory outside Python: freeing twice or reading freed memory raises."""

    def __init__(self) -> None:
        self.blocks: dict[int, torch.Tensor] = {}
        self.next = itertools.count(1)
        self.errors: list[str] = []

    def alloc(self, t: torch.Tensor) -> int:
        at = next(self.next)
        self.blocks[at] = t
        return at

    def free(self, at: int) -> None:
        if self.blocks.pop(at, None) is None:
            self.errors.append(f"double free of {at}")  # an exception in __del__ is only printed


HEAP = Heap()


class Handle:
    """vLLM's oneDNN handler: a pointer in an int64 tensor, freed by `__del__`."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.pointer = torch.tensor([HEAP.alloc(weight.float().t().clone())])

    def read(self) -> torch.Tensor:
        return HEAP.blocks[int(self.pointer)]

    def __del__(self) -> None:
        HEAP.free(int(self.pointer))


class Handled(Plain):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.handler = Handle(layer.weight)
        layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.handler.read()


class Hidden(Plain):
    """A handle made where no operator shows it: through the address, as ctypes would."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.handler = Handle.__new__(Handle)
        layer.handler.pointer = HEAP.alloc(torch.from_numpy(_raw(layer.weight)))

    def apply(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x @ layer.handler.read()


def _raw(t: torch.Tensor) -> Any:
    """A copy of a float32 tensor's memory, transposed, made behind torch's back."""
    import ctypes

    import numpy as np

    n = t.numel()
    flat = np.ctypeslib.as_array((ctypes.c_float * n).from_address(t.data_ptr()))
    return flat.reshape(tuple(t.shape)).T.copy()


PROCESSORS: dict[str, Callable[[], Plain]] = {
    "plain": Plain,
    "pack_keep": PackKeep,
    "pack_empty": PackEmpty,
    "pack_drop": PackDrop,
    "quantise": Quantise,
    "transpose": Transpose,
    "transpose_view": TransposeView,
    "child": Child,
    "in_place_hook": InPlace,
    "stateful": Stateful,
    "handle": Handled,
    "hidden_handle": Hidden,
}


# ---- layers -------------------------------------------------------------------------------


class Linear(nn.Module):
    """[out, in], split over ranks by `dim` (0 columns of the product, 1 its sums; None: whole)."""

    def __init__(
        self,
        out: int,
        in_: int,
        *,
        rank: int = 0,
        world: int = 1,
        dim: int | None = None,
        method: Plain | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.rank, self.world, self.dim = rank, world, dim
        shape = [out, in_]
        if dim is not None:
            shape[dim] //= world
        self.weight = param(*shape, dtype=dtype, weight_loader=self.load)
        self.quant_method = Plain() if method is None else method

    def load(self, p: torch.Tensor, w: torch.Tensor) -> None:
        if self.dim is not None:
            size = p.shape[self.dim]
            w = w.narrow(self.dim, self.rank * size, size)
        copy_loader(p, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


class QKV(nn.Module):
    """Fused q, k, v of this rank; KV heads are replicated where there are fewer than ranks."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, size: int, r: int, w: int) -> None:
        super().__init__()
        kv = max(1, kv_heads // w)
        self.rows = {"q": heads // w * size, "k": kv * size, "v": kv * size}
        first_kv = r * kv if kv_heads >= w else r * kv_heads // w
        self.starts = {"q": r * self.rows["q"], "k": first_kv * size, "v": first_kv * size}
        total = sum(self.rows.values())
        self.weight = param(total, hidden, dtype=BF16, weight_loader=self.load)
        self.bias = param(total, weight_loader=self.load)
        self.quant_method = Plain()

    def load(self, p: torch.Tensor, w: torch.Tensor, shard: str) -> None:
        names = list(self.rows)
        at = sum(self.rows[n] for n in names[: names.index(shard)])
        n = self.rows[shard]
        copy_loader(p.data.narrow(0, at, n), w.narrow(0, self.starts[shard], n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


class Vocab(nn.Module):
    """An embedding padded to a multiple, split over ranks; the loader zeroes padding rows."""

    def __init__(self, vocab: int, dim: int, r: int = 0, w: int = 1, *, declare: bool = False):
        super().__init__()
        self.vocab = vocab
        per = -(-vocab // (4 * w)) * 4
        self.start, self.stop = min(r * per, vocab), min((r + 1) * per, vocab)
        self.weight = param(per, dim, weight_loader=self.load)
        if declare:  # vLLM's word for what a checkpoint fills
            self.weight.weight_loader_numel = (self.stop - self.start) * dim
        self.quant_method = Plain()

    def load(self, p: torch.Tensor, w: torch.Tensor) -> None:
        if w.shape[0] != self.vocab:
            raise ValueError("vocabulary sizes differ")
        part = w.narrow(0, self.start, self.stop - self.start)
        p[: part.shape[0]].data.copy_(part)
        p[part.shape[0] :].data.fill_(0)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids % self.weight.shape[0]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.quant_method.apply(self, x)


class Experts(nn.Module):
    """[E, 2I, H] and [E, H, I], filled expert by expert; this rank's part of I."""

    def __init__(self, n: int, inner: int, hidden: int, r: int = 0, w: int = 1) -> None:
        super().__init__()
        self.rank, self.inner = r, inner // w
        self.w13_weight = param(n, 2 * self.inner, hidden, dtype=BF16, weight_loader=self.load)
        self.w2_weight = param(n, hidden, self.inner, dtype=BF16, weight_loader=self.load)

    def load(self, p: torch.Tensor, w: torch.Tensor, shard: str, expert: int) -> None:
        dim = 1 if shard == "w2" else 0
        w = w.narrow(dim, self.rank * self.inner, self.inner)
        into = p.data[expert]
        if shard != "w2":
            into = into.narrow(0, 0 if shard == "w1" else self.inner, self.inner)
        copy_loader(into, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up = torch.einsum("bh,eih->bei", x, self.w13_weight.float())
        gate, up = up.chunk(2, -1)
        return torch.einsum("bei,ehi->bh", F.silu(gate) * up, self.w2_weight.float())


# ---- models -------------------------------------------------------------------------------


class Toy(nn.Module):
    """A model with a checkpoint: `shapes` of its tensors by name, `inputs` for `forward`."""

    tied_head = False
    num_hidden_layers: int | None = None
    dtypes: ClassVar[dict[str, torch.dtype]] = {}

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        self.rank, self.world = rank, world
        self.make()
        self._built = {n: tuple(p.shape) for n, p in self.named_parameters()}

    def make(self) -> None:
        raise NotImplementedError

    def shapes(self) -> Shapes:
        return dict(self._built)

    def load_weights(self, weights: Weights) -> set[str]:
        params = dict(self.named_parameters())
        loaded = set()
        for name, w in weights:
            p = params[name]
            getattr(p, "weight_loader", copy_loader)(p, w)
            loaded.add(name)
        return loaded

    def retie(self) -> None:
        """vLLM's `maybe_retie_word_embeddings`."""

    def late(self) -> dict[str, tuple[nn.Module, Hook]]:
        return {}

    def inputs(self) -> torch.Tensor:
        return torch.randn(3, 12, generator=torch.Generator().manual_seed(7))


class Fused(Toy):
    """Attention with fused qkv and a row-parallel output, a merged MLP, two layers."""

    num_hidden_layers = 2

    def make(self) -> None:
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.qkv = QKV(12, 4, 2, 3, self.rank, self.world)
            split = {"rank": self.rank, "world": self.world}
            layer.gate_up = nn.Module()
            layer.gate_up.weight = param(2 * 8 // self.world, 12)
            layer.down = Linear(12, 8, dim=1, **split)
            layer.norm = nn.Module()
            layer.norm.weight = param(12)

    def shapes(self) -> Shapes:
        one = {
            "q_proj.weight": (12, 12), "q_proj.bias": (12,),
            "k_proj.weight": (6, 12), "k_proj.bias": (6,),
            "v_proj.weight": (6, 12), "v_proj.bias": (6,),
            "gate.weight": (8, 12), "up.weight": (8, 12), "down.weight": (12, 8),
            "norm.weight": (12,),
        }  # fmt: skip
        return {f"layers.{i}.{n}": s for i in range(2) for n, s in one.items()}

    def load_weights(self, weights: Weights) -> None:
        params = dict(self.named_parameters())
        for name, w in weights:
            module, _, kind = name.rpartition(".")
            head, _, tensor = module.rpartition(".")
            if tensor in ("q_proj", "k_proj", "v_proj"):
                p = params[f"{head}.qkv.{kind}"]
                p.weight_loader(p, w, tensor[0])
            elif tensor in ("gate", "up"):
                p = params[f"{head}.gate_up.weight"]
                n = 8 // self.world
                at = 0 if tensor == "gate" else n
                copy_loader(p.data.narrow(0, at, n), w.chunk(self.world)[self.rank])
            else:
                p = params[name]
                getattr(p, "weight_loader", copy_loader)(p, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            qkv = layer.qkv(x)
            gate, up = F.linear(x, layer.gate_up.weight).chunk(2, -1)
            x = layer.down(F.silu(gate) * up) * layer.norm.weight + qkv.sum(-1, keepdim=True)
        return x


class Embeddings(Toy):
    """Vocabulary padding and an untied head; the head declares what a checkpoint fills."""

    def make(self) -> None:
        self.embed = Vocab(10, 12, self.rank, self.world)
        self.lm_head = Vocab(10, 12, self.rank, self.world, declare=True)

    def shapes(self) -> Shapes:
        return {"embed.weight": (10, 12), "lm_head.weight": (10, 12)}

    def inputs(self) -> torch.Tensor:
        return torch.arange(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed.embed(ids))


class TiedParameter(Embeddings):
    """`lm_head.weight` is `embed.weight`: one Parameter in two modules."""

    tied_head = True
    methods: tuple[Callable[[], Plain], Callable[[], Plain]] = (Plain, Plain)

    def make(self) -> None:
        super().make()
        self.lm_head.weight = self.embed.weight
        self.embed.quant_method, self.lm_head.quant_method = (m() for m in self.methods)

    def shapes(self) -> Shapes:
        return {"embed.weight": (10, 12)}

    def load_weights(self, weights: Weights) -> set[str]:
        return super().load_weights((n, w) for n, w in weights if n != "lm_head.weight")


class TiedPacked(TiedParameter):
    """vLLM on CPU: both pack, the Parameter stays and nobody reads it."""

    methods = (Plain, PackKeep)


class TiedDropped(TiedParameter):
    """Both modules drop the shared Parameter after packing it."""

    methods = (PackDrop, PackDrop)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(torch.eye(12))[:, ids % 12].t()
        return self.lm_head(x)


class TiedHeadDropped(TiedParameter):
    """Only the head drops it: its live form must follow a tensor it has no more."""

    methods = (Plain, PackDrop)


class TiedTransposed(TiedParameter):
    """The head's live form is a new Parameter of another shape; the embedding keeps the old."""

    methods = (Plain, Transpose)


class TiedOpaque(TiedParameter):
    """The embedding goes through the loader, the head is packed from the same Parameter."""

    methods = (Plain, PackKeep)

    def load_weights(self, weights: Weights) -> set[str]:
        for name, w in weights:
            if name == "embed.weight":
                self.embed.load(self.embed.weight, w * 2)
        return set()


class TiedLies(TiedPacked):
    """As `TiedOpaque`, but only the check of the recording finds it out."""

    def load_weights(self, weights: Weights) -> set[str]:
        return super().load_weights((n, w if w.is_meta else _flipped(w)) for n, w in weights)


class TiedModule(Embeddings):
    """`lm_head` is `embed`: one module under two names."""

    tied_head = True

    def make(self) -> None:
        super().make()
        self.lm_head = self.embed

    def shapes(self) -> Shapes:
        return {"embed.weight": (10, 12)}


class TiedStorage(TiedParameter):
    """The head is another Parameter on the embedding's memory."""

    def make(self) -> None:
        super().make()
        self.lm_head.weight = nn.Parameter(self.embed.weight.data, requires_grad=False)


class Retied(Embeddings):
    """Built untied; the checkpoint brings equal values, so the memory is shared after loading."""

    def tensors(self, made: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: made["embed.weight"] for n in made}

    def retie(self) -> None:
        if torch.equal(self.embed.weight, self.lm_head.weight):
            self.lm_head.weight = self.embed.weight


class MoE(Toy):
    def make(self) -> None:
        self.experts = Experts(3, 8, 12, self.rank, self.world)

    def shapes(self) -> Shapes:
        return {
            f"experts.{e}.{w}.weight": (12, 8) if w == "w2" else (8, 12)
            for e in range(3)
            for w in ("w1", "w2", "w3")
        }

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            _, e, shard, _ = name.split(".")
            p = self.experts.w2_weight if shard == "w2" else self.experts.w13_weight
            p.weight_loader(p, w, shard, int(e))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x)


class Conv1D(Toy):
    """GPT-2: the checkpoint has [in, out]; and a fused tensor is split over three parameters."""

    def make(self) -> None:
        self.fc = Linear(8, 12)
        self.parts = nn.ParameterList([param(4, 12), param(2, 12), param(2, 12)])

    def shapes(self) -> Shapes:
        return {"fc.weight": (12, 8), "fused.weight": (8, 12)}

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            if name == "fc.weight":
                copy_loader(self.fc.weight, w.t())
            else:
                for p, part in zip(self.parts, w.split([4, 2, 2]), strict=True):
                    copy_loader(p, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * F.linear(x, torch.cat(list(self.parts)))


class Mamba(Toy):
    """A = −exp(A) by a composed loader; a buffer that views the convolution's weight."""

    method: Callable[[], Plain] = Plain

    def make(self) -> None:
        self.mixer = nn.Module()
        self.mixer.A = param(12, weight_loader=self.composed)
        self.mixer.D = param(12)
        self.mixer.conv1d = nn.Module()
        self.mixer.conv1d.weight = param(12, 1, 4)
        self.mixer.conv1d.quant_method = self.method()
        view = self.mixer.conv1d.weight.data.view(12, 4)
        self.mixer.register_buffer("conv_weights", view, persistent=False)

    @staticmethod
    def composed(p: torch.Tensor, w: torch.Tensor) -> None:
        copy_loader(p, w)
        p.data.copy_(-torch.exp(p.float()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.mixer.conv_weights
        return (x * self.mixer.A + self.mixer.D) * y.sum(-1, keepdim=True)


class PackConv(Plain):
    """Packing moves the weight to new memory and leaves the buffer on the old."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = layer.weight * 2
        layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)


class MambaPacked(Mamba):
    method = PackConv


class OwnView(Toy):
    """A packed module that holds a view of its own weight."""

    def make(self) -> None:
        self.fc = Linear(8, 12, method=PackKeep())
        self.fc.register_buffer("flat", self.fc.weight.data.view(-1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.fc.flat.sum()


class Cat(Toy):
    """The loader needs all names of a group in one call."""

    def make(self) -> None:
        self.fused = Linear(6, 12)
        self.plain = Linear(4, 12)

    def shapes(self) -> Shapes:
        return {f"{n}.weight": (i, 12) for i, n in enumerate(("a", "b", "c", "plain"), start=1)}

    def load_weights(self, weights: Weights) -> None:
        given = dict(weights)
        if parts := [given[n] for n in ("a.weight", "b.weight", "c.weight") if n in given]:
            self.fused.load(self.fused.weight, torch.cat(parts))
        if "plain.weight" in given:
            self.plain.load(self.plain.weight, given["plain.weight"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.fused(x), self.plain(x)], -1)


class Permuted(Toy):
    """GPT-OSS: experts are permuted, cloned, and cut; a bias is assigned as it comes."""

    def make(self) -> None:
        self.mlp = nn.Module()
        self.mlp.w13 = param(2, 6, 12)
        self.mlp.bias = param(12)

    def shapes(self) -> Shapes:
        return {"mlp.gate_up": (2, 12, 6), "mlp.bias": (12,)}

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            if name == "mlp.bias":
                self.mlp.bias.data = w.detach().view(12)
            else:
                self.mlp.w13.data.copy_(w.permute(0, 2, 1).contiguous().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bh,eih->bi", x + self.mlp.bias, self.mlp.w13)


class Assigned(Toy):
    """`.data =` of a view, of a computed tensor, and a whole new Parameter."""

    def make(self) -> None:
        for name in ("viewed", "computed", "replaced"):
            self.add_module(name, Linear(8, 12))

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            module = getattr(self, name.split(".")[0])
            if name.startswith("viewed"):
                module.weight.data = w.view(8, 12)
            elif name.startswith("computed"):
                module.weight.data = w + 1
            else:
                module.weight = nn.Parameter(w.clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.viewed(x) + self.computed(x) * self.replaced(x)


class Restrided(Toy):
    """The loader turns its own parameter round (`.data =` on the same memory) and copies."""

    def make(self) -> None:
        self.fc = Linear(12, 8)

    def shapes(self) -> Shapes:
        return {"fc.weight": (8, 12)}

    def load_weights(self, weights: Weights) -> None:
        for _, w in weights:
            self.fc.weight.data = self.fc.weight.data.view(8, 12)
            self.fc.weight.data.copy_(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Written(Toy):
    """`index_put_`, `add_`, and parts filled with a constant."""

    def make(self) -> None:
        for name in ("indexed", "added", "filled", "refilled"):
            self.add_module(name, Linear(8, 12))

    def shapes(self) -> Shapes:
        return super().shapes() | {"filled.weight": (6, 12), "refilled.weight": (8, 12)}

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            p = getattr(self, name.split(".")[0]).weight.data
            if name.startswith("indexed"):
                p.index_put_((torch.arange(7, -1, -1, device=p.device),), w)
            elif name.startswith("added"):
                p.zero_()
                p.add_(w)
            elif name.startswith("filled"):
                p[:6].copy_(w)
                p[6:].fill_(-1.5)
            else:  # a constant over what was copied: the order matters
                p.copy_(w)
                p[2:3].fill_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.indexed(x) + self.added(x) * self.filled(x) + self.refilled(x)


class ZeroedFirst(Toy):
    """The whole parameter is zeroed, then a part of it copied: padding, done the other way."""

    def make(self) -> None:
        self.fc = Linear(8, 12)
        self.two = nn.Module()
        self.two.weight = param(4, 12)

    def shapes(self) -> Shapes:
        return {"fc.weight": (6, 12), "two.a": (2, 12), "two.b": (2, 12)}

    def load_weights(self, weights: Weights) -> None:
        self.two.weight.data.zero_()
        for name, w in weights:
            if name == "fc.weight":
                self.fc.weight.data.zero_()
                self.fc.weight.data[:6].copy_(w)
            else:
                at = 0 if name == "two.a" else 2
                self.two.weight.data[at : at + 2].copy_(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + F.linear(x, self.two.weight).sum(-1, keepdim=True)


class ReadsValues(Toy):
    """The loader asks for a value, which meta tensors do not have; other names are plain."""

    def make(self) -> None:
        self.scaled = Linear(8, 12)
        self.plain = Linear(8, 12)

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            if name == "scaled.weight":
                w = w * 2 if w.abs().max().item() < 1e3 else w
            getattr(self, name.split(".")[0]).weight.data.copy_(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x) * self.plain(x)


class SeenTwice(Toy):
    """The loader looks at clones of the first names before it loads (vLLM's pooling models);
    it changes one of them."""

    def make(self) -> None:
        self.fc = Linear(8, 12)
        self.out = Linear(12, 8)

    def load_weights(self, weights: Weights) -> None:
        clones = [(n, w.clone()) for n, w in weights]
        super().load_weights((n, w.mul_(2) if n == "out.weight" else w) for n, w in clones)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.fc(x))


class Skips(Toy):
    """The loader skips what it does not know, in silence."""

    num_hidden_layers = 1

    def make(self) -> None:
        self.fc = Linear(8, 12)

    def load_weights(self, weights: Weights) -> None:
        super().load_weights((n, w) for n, w in weights if n == "fc.weight")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class Attributes(Toy):
    """The loader keeps tensors as plain attributes: one as it comes, one computed, in a list."""

    def make(self) -> None:
        self.fc = Linear(8, 12)
        self.note = nn.Module()
        self.note.scale = None
        self.note.table = []

    def shapes(self) -> Shapes:
        return {"fc.weight": (8, 12), "note.scale": (8,), "note.table": (8,)}

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            if name == "note.scale":
                self.note.scale = w
            elif name == "note.table":
                self.note.table = [w.exp()]
            else:
                self.fc.weight.data.copy_(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.note.scale + self.note.table[0]


class Lies(Toy):
    """The loader does something else with meta tensors than with real ones."""

    num_hidden_layers = 2

    def make(self) -> None:
        self.layers = nn.ModuleList(Linear(8, 12) for _ in range(2))
        self.honest = Linear(8, 12)

    def load_weights(self, weights: Weights) -> None:
        params = dict(self.named_parameters())
        for name, w in weights:
            real = "layers" in name and not w.is_meta
            params[name].data.copy_(_flipped(w) if real else w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x) + self.layers[1](x) * self.honest(x)


def _flipped(w: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(w.numpy()[::-1].copy())


class Bytes(Toy):
    """Copies through views of another dtype: of the same width, and of bytes."""

    dtypes: ClassVar = {"packed.weight": torch.float8_e4m3fn}

    def make(self) -> None:
        self.same = Linear(8, 12, dtype=BF16)
        self.bytes = Linear(8, 12)
        self.packed = nn.Module()
        self.packed.weight = nn.Parameter(torch.zeros(8, 12, dtype=torch.uint8), False)

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            p = getattr(self, name.split(".")[0]).weight.data
            if name.startswith("same"):
                p.view(torch.int16).copy_(w.view(torch.int16))
            elif name.startswith("bytes"):
                p.view(torch.uint8).copy_(w.view(torch.uint8))
            else:
                p.copy_(w.view(torch.uint8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.same(x) + self.bytes(x) * F.linear(x, self.packed.weight.float())


class Buffers(Toy):
    """Buffers: one of the checkpoint, one computed at build, a scalar given as a vector."""

    def make(self) -> None:
        self.fc = Linear(12, 12)
        self.gate = nn.Module()
        self.gate.register_buffer("correction", torch.full((12,), float("nan")))
        self.gate.scale = param()
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.arange(12.0), persistent=False)

    def shapes(self) -> Shapes:
        return {"fc.weight": (12, 12), "gate.correction": (12,), "gate.scale": (1,)}

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            if name == "gate.correction":
                self.gate.correction.copy_(w)
            elif name == "gate.scale":
                self.gate.scale.data.copy_(w.view(()))
            elif name == "fc.weight":
                self.fc.weight.data.copy_(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * self.gate.scale + self.gate.correction * self.rotary_emb.inv_freq


class Carved(Toy):
    """Two parameters cut from one allocation: neither is a view of the other."""

    def make(self) -> None:
        flat = torch.full((8 * 12 + 8,), float("nan"))
        self.fc = nn.Module()
        self.fc.weight = nn.Parameter(flat[:96].view(8, 12), requires_grad=False)
        self.fc.bias = nn.Parameter(flat[96:], requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


class Columns(Toy):
    """Several names interleaved by column, and a parameter kept transposed in memory."""

    def make(self) -> None:
        self.fc = Linear(8, 12)
        memory = torch.full((12, 8), float("nan"))
        self.turned = nn.Module()
        self.turned.weight = nn.Parameter(memory.t(), requires_grad=False)

    def shapes(self) -> Shapes:
        return {"even": (8, 6), "odd": (8, 6), "turned.weight": (8, 12)}

    def load_weights(self, weights: Weights) -> None:
        for name, w in weights:
            if name in ("even", "odd"):
                self.fc.weight.data[:, name == "odd" :: 2].copy_(w)
            else:
                copy_loader(self.turned.weight, w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + F.linear(x, self.turned.weight)


class MLA(Toy):
    """A late hook absorbs `kv_b_proj` into tensors of another module: attribute and buffer."""

    method: Callable[[], Plain] = Plain

    def make(self) -> None:
        self.kv_b_proj = Linear(8, 12, method=self.method())
        self.other = Linear(8, 12)
        self.attn = nn.Module()
        self.attn.sinks = param(8)
        self.attn.register_buffer("W_UV", None)

    def late(self) -> dict[str, tuple[nn.Module, Hook]]:
        return {"attn": (self.attn, self.absorb)}

    def absorb(self) -> None:
        eye = torch.eye(12)
        dequantised = self.kv_b_proj(eye).t()  # through the quant method, as vLLM does
        self.attn.W_UK = dequantised[:4] * 2
        self.attn.W_UV = dequantised[4:].t().contiguous()
        self.attn.sinks_f32 = self.attn.sinks * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.attn.W_UK).sum(-1, keepdim=True)
        return self.other(x) * y + (x @ self.attn.W_UV).sum(-1, keepdim=True) + self.attn.sinks_f32


class MLAPacked(MLA):
    method = PackEmpty


class LateTwice(MLA):
    """Late hooks that read what the one before made; the first scales its own weight."""

    def make(self) -> None:
        super().make()
        self.middle, self.last = nn.Module(), nn.Module()

    def late(self) -> dict[str, tuple[nn.Module, Hook]]:
        more = {"middle": (self.middle, self.half), "last": (self.last, self.again)}
        return super().late() | more

    def absorb(self) -> None:
        self.attn.sinks.data.mul_(2)
        super().absorb()

    def half(self) -> None:
        self.middle.parts = [self.attn.W_UV / 2]

    def again(self) -> None:
        self.last.total = self.middle.parts[0].sum(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.last.total[:1]


class LateOwn(Toy):
    """A late hook turns its own module's weight round: nothing can repeat that from outside."""

    def make(self) -> None:
        self.attn = nn.Module()
        self.attn.weight = param(8, 12)

    def late(self) -> dict[str, tuple[nn.Module, Hook]]:
        return {"attn": (self.attn, self.turn)}

    def turn(self) -> None:
        if self.attn.weight.shape == (8, 12):
            self.attn.weight = nn.Parameter(self.attn.weight.t().contiguous(), False)


class Writer(Plain):
    """A layer's hook that leaves its result in another module."""

    def __init__(self, other: nn.Module) -> None:
        self.other = other

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.other.absorbed = layer.weight.t().contiguous() * 2


class Elsewhere(Toy):
    def make(self) -> None:
        self.user = nn.Module()
        self.fc = Linear(8, 12)
        self.fc.quant_method = Writer(self.user)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.user.absorbed


class Processed(Toy):
    """One linear layer with a processor, between two plain ones."""

    method: Callable[[], Plain] = Plain

    def make(self) -> None:
        self.before = Linear(12, 12)
        self.fc = Linear(8, 12, method=self.method())
        self.after = Linear(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.fc(self.before(x)))


def _processed(method: Callable[[], Plain]) -> type[Toy]:
    return type(f"Processed{method.__name__}", (Processed,), {"method": staticmethod(method)})


class Whole(Toy):
    """Several of the above in one model, under prefixes."""

    parts: ClassVar[dict[str, type[Toy]]] = {}

    def make(self) -> None:
        for name, kind in self.parts.items():
            self.add_module(name, kind(self.rank, self.world))

    def shapes(self) -> Shapes:
        return {f"{n}.{k}": s for n in self.parts for k, s in getattr(self, n).shapes().items()}

    def load_weights(self, weights: Weights) -> None:
        rows: dict[str, list[tuple[str, torch.Tensor]]] = {}
        for name, w in weights:
            part, _, rest = name.partition(".")
            rows.setdefault(part, []).append((rest, w))
        for part, given in rows.items():
            getattr(self, part).load_weights(given)

    def late(self) -> dict[str, tuple[nn.Module, Hook]]:
        return {
            f"{n}.{k}".rstrip("."): row
            for n in self.parts
            for k, row in getattr(self, n).late().items()
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([m(m.inputs()).flatten() for m in self.children()])


class Everything(Whole):
    parts: ClassVar = {
        "fused": Fused, "tied": TiedPacked, "moe": MoE, "mamba": MambaPacked, "cat": Cat,
        "mla": MLAPacked, "values": ReadsValues, "written": Written,
        "quantised": _processed(Quantise), "attributes": Attributes,
    }  # fmt: skip


TOYS: dict[str, type[Toy]] = {
    c.__name__: c
    for c in (
        Fused, Embeddings, TiedParameter, TiedPacked, TiedDropped, TiedHeadDropped, TiedTransposed,
        TiedOpaque, TiedLies, TiedModule, TiedStorage, Retied, MoE, Conv1D, Mamba,
        MambaPacked, OwnView, Cat, Permuted, Assigned, Restrided, Written, ZeroedFirst,
        ReadsValues, SeenTwice, Skips, Attributes, Lies, Bytes,
        Buffers, Carved, Columns, MLA, MLAPacked, LateTwice, Elsewhere, Everything,
    )
} | {f"processed_{name}": _processed(m) for name, m in PROCESSORS.items()}  # fmt: skip
SHARDED = ("Fused", "Embeddings", "TiedPacked", "MoE", "Everything")  # toys that split over ranks


# ---- the host -----------------------------------------------------------------------------


class ToyHost:
    """`worker/plan/host.py: Host` for a toy that was built, loaded and processed."""

    def __init__(self, model: Toy) -> None:
        self.model: nn.Module = model
        self.toy = model
        self.blueprint = Blueprint(model)
        self.device = torch.device("cpu")
        self.num_hidden_layers = model.num_hidden_layers
        self.tied_head = model.tied_head
        self.inside = 0  # depth of `context`
        self.fail_load: Exception | None = None
        self.own_names: set[str] = set()  # of the checkpoint it was started from, where it matters

    def load(self, weights: Weights) -> object:
        if self.fail_load is not None:
            raise self.fail_load
        return self.toy.load_weights(weights)

    def checkpoint(self) -> tuple[ParamSpec, ...]:
        return specs_of(checkpoint(self.toy, 1))

    def checkpoint_names(self) -> frozenset[str]:
        return frozenset(self.own_names)

    def hook(self, module: nn.Module) -> Hook | None:
        method = getattr(module, "quant_method", None)
        if not isinstance(method, Plain):
            return None
        return functools.partial(method.process_weights_after_loading, module)

    def late_hooks(self) -> dict[str, tuple[nn.Module, Hook]]:
        return self.toy.late()

    @contextmanager
    def _active(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def context(self) -> AbstractContextManager[object]:
        return self._active()

    def loadable(self, t: torch.Tensor) -> int:
        return int(getattr(t, "weight_loader_numel", t.numel()))

    def first_load(self, weights: Weights) -> None:
        """What vLLM does when it starts."""
        with torch.no_grad():
            self.load(weights)
            self.toy.retie()
            for module in dict.fromkeys(self.model.modules()):
                if (hook := self.hook(module)) is not None:
                    hook()
            for _, hook in self.late_hooks().values():
                hook()


def checkpoint(toy: Toy, seed: int) -> dict[str, torch.Tensor]:
    """A checkpoint for `toy`: random values, the toy's own dtypes; the same for every rank."""
    g = torch.Generator().manual_seed(seed)
    made = {n: torch.randn(s, generator=g) for n, s in toy.shapes().items()}
    made = {n: t.to(toy.dtypes.get(n, _dtype(n))) for n, t in made.items()}
    adjust = getattr(toy, "tensors", None)
    return adjust(made) if adjust else made


def _dtype(name: str) -> torch.dtype:
    """bfloat16 for some, so that copies cast; decided by the name alone."""
    ends = ("q_proj.weight", "k_proj.weight", "w1.weight", "same.weight")
    return BF16 if name.endswith(ends) else torch.float32


def specs_of(tensors: dict[str, torch.Tensor]) -> tuple[ParamSpec, ...]:
    return tuple(
        ParamSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape))
        for n, t in tensors.items()
    )


def fresh(kind: str | type[Toy], seed: int, rank: int = 0, world: int = 1) -> ToyHost:
    """A toy newly built and loaded from its checkpoint of `seed`."""
    toy = (TOYS[kind] if isinstance(kind, str) else kind)(rank, world)
    host = ToyHost(toy)
    # Clones: a loader that keeps what it is given must not tie two hosts together.
    host.first_load([(n, t.clone()) for n, t in checkpoint(toy, seed).items()])
    return host


# ---- what there is of a model -------------------------------------------------------------


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that can be reached from the model, by path: parameters, buffers, attributes,
    closures, bound arguments, and what handles point at."""
    out: dict[str, torch.Tensor] = {}
    _walk(model, "", out, set())
    return out


def _walk(x: Any, path: str, out: dict[str, torch.Tensor], seen: set[int]) -> None:
    if isinstance(x, torch.Tensor):
        out[path] = x.detach()
        return
    if isinstance(x, Handle):
        out[path] = x.read()
        return
    if id(x) in seen or isinstance(x, type):
        return
    rows: Iterable[tuple[Any, Any]]
    if isinstance(x, nn.Module):
        rows = [
            *x._parameters.items(), *x._buffers.items(), *x._modules.items(),
            *((k, v) for k, v in x.__dict__.items() if not k.startswith("_")),
        ]  # fmt: skip
    elif isinstance(x, dict):
        rows = x.items()
    elif isinstance(x, (list, tuple)):
        rows = enumerate(x)
    elif isinstance(x, functools.partial):
        rows = [("func", x.func), *enumerate(x.args), *x.keywords.items()]
    elif hasattr(x, "__closure__"):
        rows = enumerate(c.cell_contents for c in x.__closure__ or ())
    elif hasattr(x, "__self__"):
        rows = [("self", x.__self__)]
    else:
        rows = vars(x).items() if hasattr(x, "__dict__") else ()
    seen.add(id(x))
    for key, value in rows:
        _walk(value, f"{path}.{key}".lstrip("."), out, seen)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
