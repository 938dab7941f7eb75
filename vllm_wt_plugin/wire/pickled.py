"""The one place that reads a pickle: CUDA handles, as vLLM's own HTTP client packs them.

It reads what `pickle` wrote without doing what a pickle may do. Only the opcodes that build plain
data run; of the names in it (torch's dtypes, classes, `rebuild_cuda_tensor`) none is imported, each
becomes its own text. Imported only where VLLM_ALLOW_INSECURE_SERIALIZATION is set.
"""

from __future__ import annotations

import base64
import io
import pickle  # noqa: TID251 -- read as data, see above
import struct
from collections.abc import Callable
from typing import Any, ClassVar

from vllm_wt_plugin.errors import HandleError

MAX_BYTES = 64 << 20
_DIMENSIONS = 16

_PLAIN = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS "
    "MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE"
)
# What the reader raises for a stream that is cut, or that uses an opcode which is not plain.
_BROKEN = (
    ArithmeticError, AttributeError, EOFError, LookupError, TypeError, ValueError,
    pickle.UnpicklingError, struct.error,
)  # fmt: skip


def _size(dimensions: tuple[int, ...]) -> tuple[int, ...]:
    """In place of `torch.Size`, the one thing that is called."""
    if not isinstance(dimensions, tuple) or len(dimensions) > _DIMENSIONS:
        raise pickle.UnpicklingError("a shape is not a short tuple")
    return dimensions


class _Reader(pickle._Unpickler):
    """The one written in Python: its memo is a dict and its reads end with the input, where the
    one in C allocates whatever size it is told."""

    dispatch: ClassVar[dict[int, Callable[..., Any]]] = {
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in _PLAIN.split())
    }

    def find_class(self, module: str, name: str) -> Any:
        text = f"{module}.{name}"
        return _size if text == "torch.Size" else text


def read(text: str) -> Any:
    """Base64 of a pickle as plain data: dicts, lists, tuples, numbers, bytes, text.

    Raises HandleError for anything else.
    """
    if len(text) > MAX_BYTES * 4 // 3:
        raise HandleError(f"the pickled handles have more than {MAX_BYTES} bytes")
    try:
        return _Reader(io.BytesIO(base64.b64decode(text, validate=True))).load()
    except _BROKEN as exc:
        raise HandleError(
            f"not handles as vLLM's HTTP client pickles them ({type(exc).__name__}: {exc})",
            where="ipc_handles_pickled",
            next_step="send what HTTPVLLMWeightSyncClient sends, or use WeightSync",
        ) from exc
