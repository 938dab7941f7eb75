"""Who may reach the weight routes: environment → AccessPolicy → AccessMiddleware → routes."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_wt_plugin.errors import AccessDenied, RequestError

logger = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Guard = Callable[[str, str], bool]  # (path, method) → is this a weight route?
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_HEADER_SAFE = re.compile(rb"[!-~]+")
_OCTET = rb"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LOCAL = re.compile(rb"(?i)(localhost|\[::1\]|127(\." + _OCTET + rb"){3})(:[0-9]{1,5})?")
_PROXY_HEADER = re.compile(rb"x-forwarded-.*|forwarded|via|x-real-ip", re.IGNORECASE)
_PROVEN = "wt.proven"  # in the scope of a request that was let in: whether it had one
_OPEN_UP = (
    "set WT_TOKEN (or WT_TOKEN_FILE) on the server and send it as 'Authorization: Bearer …', "
    "or name the trainer's address in the server's WT_TRUSTED_HOSTS"
)


class Unauthorized(AccessDenied):
    status = 401


class BodyTooLarge(AccessDenied):
    status = 413


class UnsupportedMediaType(AccessDenied):
    status = 415


@dataclass(frozen=True, kw_only=True)
class AccessPolicy:
    """Without tokens only this machine is admitted; `trusted` peers never need a token."""

    tokens: tuple[bytes, ...] = field(default=(), repr=False)  # sha256 of each token that counts
    trusted: tuple[Network, ...] = ()  # peer addresses

    @classmethod
    def from_env(cls, environ: Mapping[str, str], api_keys: Sequence[str]) -> AccessPolicy:
        """Reads WT_TOKEN or WT_TOKEN_FILE, and WT_TRUSTED_HOSTS; call once, at start.

        `api_keys` are vLLM's own (`--api-key`, else `VLLM_API_KEY`); without a WT_TOKEN they count,
        with a warning. Raises RequestError: do not serve the weight routes after that.
        """
        trusted, tokens = _trusted(environ.get("WT_TRUSTED_HOSTS", "")), _own_token(environ)
        if not tokens:
            # A bare string is a sequence too, and would admit each of its letters.
            keys = [api_keys] if isinstance(api_keys, str) else api_keys
            if tokens := [key.encode() for key in keys if key]:
                logger.warning("WT_TOKEN is not set: every vLLM API key can replace the weights")
        return cls(tokens=tuple(hashlib.sha256(t).digest() for t in tokens), trusted=trusted)


def _own_token(environ: Mapping[str, str]) -> list[bytes]:
    """The value of WT_TOKEN or of the file WT_TOKEN_FILE names; [] only if neither is set."""
    names = [name for name in ("WT_TOKEN", "WT_TOKEN_FILE") if name in environ]
    if not names:
        return []
    token, flaw = environ.get("WT_TOKEN", "").encode("utf-8", "surrogateescape"), ""
    if len(names) == 2:
        flaw = "is given twice"
    elif names == ["WT_TOKEN_FILE"]:
        try:
            token = Path(environ["WT_TOKEN_FILE"]).read_bytes().rstrip(b"\r\n")
        except OSError as exc:
            flaw = f"cannot be read: {exc}"
    if flaw or not _HEADER_SAFE.fullmatch(token):
        flaw = flaw or ("is not printable ASCII without spaces" if token else "is empty")
        step = "set one of WT_TOKEN and WT_TOKEN_FILE, for example from `openssl rand -hex 32`"
        raise RequestError(f"the token {flaw}", where=" and ".join(names), next_step=step)
    return [token]


def _trusted(value: str) -> tuple[Network, ...]:
    """The networks of a comma-separated list; RequestError names the first bad entry."""
    try:
        return tuple(map(ipaddress.ip_network, filter(None, map(str.strip, value.split(",")))))
    except ValueError as exc:
        step = "list addresses or CIDRs, such as 10.0.0.7,10.1.0.0/16,fd00::/8"
        raise RequestError(str(exc), where="WT_TRUSTED_HOSTS", next_step=step) from exc


def check(policy: AccessPolicy, scope: Scope) -> None:
    """Raises AccessDenied, with its HTTP `status`, unless this ASGI http request may go on.

    Pure. No message repeats a header's value, and the peer of a forwarded request is one.
    """
    peer, unix, where = _peer(scope)
    if _values(scope, b"origin"):
        step = "call from a program that sends no Origin header, not from a web page"
        raise AccessDenied("browsers may not reach the weight routes", where=where, next_step=step)
    if peer is None or not any(peer in network for network in policy.trusted):
        if policy.tokens:
            _check_token(policy, scope, where)
        else:
            _check_local(scope, unix or (peer is not None and peer.is_loopback), unix, where)
    _check_media_type(scope, where)


def require_same_host(scope: Scope) -> None:
    """Raises AccessDenied for a peer that is not on this machine, whatever token it has."""
    peer, unix, where = _peer(scope)
    if not unix and not (peer is not None and peer.is_loopback):
        step = "call from this machine, over http://localhost or 127.0.0.1"
        raise AccessDenied("memory is shared within one host only", where=where, next_step=step)


def _peer(scope: Scope) -> tuple[Address | None, bool, str]:
    """The peer's address (IPv4 where mapped into IPv6), whether it is a Unix socket, and words.

    uvicorn rewrites `client` from X-Forwarded-For, and a proxy on this machine lends its loopback
    address to strangers: what was forwarded is never admitted for where it comes from.
    """
    if any(_PROXY_HEADER.fullmatch(name) for name, _ in scope["headers"]):
        return None, False, "a forwarded request"
    client, server = scope.get("client") or ("", 0), scope.get("server") or ("", 0)
    # Our own end decides: uvicorn knows no client either where a TCP peer has hung up already.
    unix = not client[0] and server[1] is None
    try:
        peer = ipaddress.ip_address(client[0])
    except ValueError:
        return None, unix, "Unix socket" if unix else "unknown peer"
    peer = getattr(peer, "ipv4_mapped", None) or peer
    return peer, False, f"peer {peer}"


def require_token(scope: Scope) -> None:
    """Raises AccessDenied unless the request came with a token, wherever it came from."""
    if not scope.get(_PROVEN):
        step = (
            "set WT_TOKEN on the server; vLLM's own client sends it where the trainer's ~/.netrc "
            "says 'machine HOST login wt password TOKEN'. WeightSync needs no pickle"
        )
        raise AccessDenied("pickled handles need a token", next_step=step)


def _has_token(policy: AccessPolicy, scope: Scope) -> bool:
    """As a bearer, or as the password that `requests` takes from ~/.netrc."""
    given = _values(scope, b"authorization")
    scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
    if scheme.lower() == b"basic":
        try:
            token = base64.b64decode(token, validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b"bearer":
        return False
    # As vLLM's own check does: header bytes are latin-1, what is hashed is UTF-8.
    digest = hashlib.sha256(token.decode("latin-1").encode()).digest()
    # A sum looks at every token, so that time does not tell which one matched.
    return sum(hmac.compare_digest(known, digest) for known in policy.tokens) > 0


def _check_token(policy: AccessPolicy, scope: Scope, where: str) -> None:
    if not _has_token(policy, scope):
        given = _values(scope, b"authorization")
        what = "wrong token for the weight routes" if given else "the weight routes need a token"
        step = "send 'Authorization: Bearer …' with the server's WT_TOKEN, if unset its --api-key"
        raise Unauthorized(what, where=where, next_step=step)


def _check_local(scope: Scope, local: bool, unix: bool, where: str) -> None:
    """A foreign Host that resolves to loopback is how a web page reaches a local server."""
    hosts = _values(scope, b"host")
    if not local:
        what = "without a token only this machine may reach the weight routes"
    elif (hosts or not unix) and not (len(hosts) == 1 and _LOCAL.fullmatch(hosts[0])):
        what = "without a token the URL must name this machine: http://localhost or 127.0.0.1"
    else:
        return
    raise AccessDenied(what, where=where, next_step=_OPEN_UP)


def _check_media_type(scope: Scope, where: str) -> None:
    """vLLM's own client posts no body and no type to some routes; a web form always has a type."""
    types, lengths = _values(scope, b"content-type"), _values(scope, b"content-length")
    bodiless = lengths in ([], [b"0"]) and not _values(scope, b"transfer-encoding")
    if scope["method"] in ("GET", "HEAD", "OPTIONS") or (bodiless and not types):
        return
    if len(types) != 1 or types[0].split(b";")[0].strip().lower() != b"application/json":
        what, step = "the weight routes take JSON only", "send 'Content-Type: application/json'"
        raise UnsupportedMediaType(what, where=where, next_step=step)


def _values(scope: Scope, name: bytes) -> list[bytes]:
    return [value for key, value in scope["headers"] if key.lower() == name]


class AccessMiddleware:
    """Pure ASGI: puts `check` and a body limit (bytes) before each path that `guarded` names.

    `guarded` gets the path without the root path, as the router sees it, and the method.
    Websockets on a guarded path are refused. Anything else passes untouched.
    """

    def __init__(
        self, app: ASGIApp, policy: AccessPolicy, guarded: Guard, max_body: int = 256 << 20
    ) -> None:
        self.app, self.policy, self.guarded, self.max_body = app, policy, guarded, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        methods = {"http": [scope.get("method", "")], "websocket": ["GET", "POST"]}
        if not any(self.guarded(_route_path(scope), m) for m in methods.get(scope["type"], [])):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _Exchange(scope, receive, send, self.max_body).run(self.app, self.policy)


def _route_path(scope: Scope) -> str:
    """Without the root path, stripped exactly where Starlette's router strips it."""
    rest = str(scope["path"]).removeprefix(scope.get("root_path", ""))
    return rest if rest == "" or rest.startswith("/") else str(scope["path"])


class _Exchange:
    """One guarded request, answered exactly once: by the app, or by us in its place."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self._scope, self._receive, self._send, self._limit = scope, receive, send, limit
        self._received, self._started, self._refused = 0, False, False

    async def run(self, app: ASGIApp, policy: AccessPolicy) -> None:
        try:
            check(policy, self._scope)
            self._scope[_PROVEN] = _has_token(policy, self._scope)
            for length in filter(bytes.isdigit, _values(self._scope, b"content-length")):
                # 19 digits are too many already, and thousands of them Python does not convert.
                self._check_size(int(length[:19]))
            await app(self._scope, self._receive_counted, self._send_unless_refused)
        except AccessDenied as refusal:
            await self._refuse(refusal)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._limit:
            step = "send tensor handles or smaller patches; weights do not travel in a request"
            raise BodyTooLarge(f"the body is larger than {self._limit} bytes", next_step=step)

    async def _receive_counted(self) -> Message:
        message = await self._receive()
        self._received += len(message.get("body", b""))
        try:
            self._check_size(self._received)
        except BodyTooLarge as refusal:
            # Answer before the app learns of it: FastAPI would turn the error into its own 400.
            await self._refuse(refusal)
            raise
        return message

    async def _send_unless_refused(self, message: Message) -> None:
        if not self._refused:
            self._started = True
            await self._send(message)

    async def _refuse(self, refusal: AccessDenied) -> None:
        if self._refused:
            return
        if self._started:
            raise refusal
        self._refused = True  # before the first await: the app may be sending meanwhile
        content = refusal.to_dict() | {"code": AccessDenied.__name__}  # what `from_dict` knows
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
        response = JSONResponse(content, status_code=refusal.status, headers=headers)
        await response(self._scope, self._receive, self._send)
