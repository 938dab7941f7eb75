"""One parameter as both sides name it, in checkpoint coordinates."""

from __future__ import annotations

import math
from typing import Annotated

import msgspec

from vllm_wt_plugin.errors import RequestError

MAX_ELEMENTS = 2**40

# Bytes per element of every dtype that may travel.
ITEMSIZE = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int16": 2,
    "uint16": 2,
    "bfloat16": 2,
    "float16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "float64": 8,
}

# Versions and owners are said in logs and refusals, of one line each.
LINE = r"^[^\x00-\x1f\x7f-\x9f]*\Z"
Version = Annotated[str, msgspec.Meta(min_length=1, max_length=256, pattern=LINE)]
Owner = Annotated[str, msgspec.Meta(max_length=256, pattern=LINE)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Session = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{32})?\Z")]  # "": the open one
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_ELEMENTS)]
Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)]


class ParamSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Name, dtype name (`"bfloat16"`, …) and full shape of one checkpoint tensor."""

    name: Name
    dtype: str
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * itemsize(self.dtype, self.name)


def itemsize(dtype: str, name: str) -> int:
    """Bytes per element; raises RequestError naming the parameter for an unknown dtype."""
    try:
        return ITEMSIZE[dtype]
    except KeyError:
        raise RequestError(
            f"dtype {dtype!r} cannot be transferred",
            where=name,
            next_step=f"use one of {', '.join(ITEMSIZE)}",
        ) from None


def check_specs(specs: tuple[ParamSpec, ...]) -> None:
    """Refuse duplicates, unknown dtypes and tensors beyond 2^40 elements."""
    seen: set[str] = set()
    for spec in specs:
        itemsize(spec.dtype, spec.name)
        if spec.numel > MAX_ELEMENTS:
            raise RequestError(f"shape {spec.shape} has more than 2^40 elements", where=spec.name)
        if spec.name in seen:
            raise RequestError("the same name is given twice", where=spec.name)
        seen.add(spec.name)
