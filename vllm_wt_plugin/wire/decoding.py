"""Bytes and plain data into structs; what does not fit is a RequestError with its path."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from vllm_wt_plugin.errors import RequestError

T = TypeVar("T")


def decode(decoder: msgspec.json.Decoder[T] | msgspec.msgpack.Decoder[T], data: bytes) -> T:
    """Decode or raise RequestError with the path of what is wrong."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as exc:
        raise _refused(exc) from exc
    except RecursionError as exc:
        raise RequestError("the body is nested too deeply") from exc
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from exc


def convert(data: object, kind: type[T]) -> T:
    """Plain data as one of the structs, or RequestError as `decode`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as exc:
        raise _refused(exc) from exc


def _refused(exc: msgspec.ValidationError) -> RequestError:
    text, _, path = str(exc).partition(" - at ")
    return RequestError(text, where=path.strip("`"))
