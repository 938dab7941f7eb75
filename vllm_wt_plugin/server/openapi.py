"""What `/openapi.json` says of the routes: bodies as the structs of `wire/` define them."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_wt_plugin.wire import bridge
from vllm_wt_plugin.wire import messages as msg
from vllm_wt_plugin.wire.params import LINE
from vllm_wt_plugin.wire.patches import PatchPush

BODIES: dict[str, type[msgspec.Struct]] = {
    "/push_weights": msg.PushRequest,
    "/push_patches": PatchPush,
    "/push_broadcast": msg.BroadcastPush,
    "/weight_checksums": msg.NamesBody,
    "/init_weight_transfer_engine": msg.InitBody,
    "/start_weight_update": msg.StartBody,
    "/update_weights": msg.UpdateBody,
    "/finish_weight_update": msg.FinishBody,
    "/abort_weight_update": msg.AbortBody,
    "/update_weight_version": msg.VersionBody,
    "/bridge/export_cuda_ipc": bridge.ExportBody,
    "/bridge/notify_update": bridge.NotifyBody,
    "/bridge/detach": bridge.DetachBody,
}
PAUSE_MODES = ("abort", "wait", "keep")
_QUERIES: dict[str, dict[str, dict[str, Any]]] = {
    "/pause": {
        "mode": {"type": "string", "enum": PAUSE_MODES, "default": "abort"},
        "clear_cache": {"type": "boolean", "default": True},
    },
    "/get_world_size": {"include_dp": {"type": "boolean", "default": True}},
}
_TEXTS = {name: {"type": "string"} for name in ("code", "error", "where", "next_step")}
_ERROR = {
    "description": "What was wrong, where, and what to do next",
    "content": {
        "application/json": {
            "schema": {"type": "object", "properties": _TEXTS, "required": ["code", "error"]}
        }
    },
}


def described(path: str) -> dict[str, Any]:
    """FastAPI's `openapi_extra` of a route."""
    out: dict[str, Any] = {"responses": {"default": _ERROR}}
    if path in _QUERIES:
        rows = _QUERIES[path].items()
        out["parameters"] = [{"name": n, "in": "query", "schema": s} for n, s in rows]
    if body := BODIES.get(path):
        (root,), parts = msgspec.json.schema_components([body])
        schema = _whole(root, parts)
        out["requestBody"] = {
            "required": bool(schema["required"]),
            "content": {"application/json": {"schema": schema}},
        }
    return out


def _whole(node: Any, parts: dict[str, Any]) -> Any:
    """Without references: a route cannot add to the components of vLLM's document. `\\Z` is
    Python's alone; that text is one line is too dull a pattern for those who make examples."""
    match node:
        case {"$ref": str(ref)}:
            return _whole(parts[ref.rpartition("/")[2]], parts)
        case dict():
            kept = {k: v for k, v in node.items() if k != "discriminator" and v != LINE}
            return {k: _whole(v, parts) for k, v in kept.items()}
        case list() | tuple():
            return [_whole(v, parts) for v in node]
        case str():
            return node.removesuffix(r"\Z") + "$" if node.endswith(r"\Z") else node
    return node
