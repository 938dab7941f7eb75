"""Kept connections to one server, on the standard library's HTTP client.

A push waits for one request: between two of them the trainer works, and everything is cold. Then
httpcore or urllib3 take as long for it as the way to the server and back (benchmarks/NOTES.md).
"""

from __future__ import annotations

import http.client
import select
import time
from collections import deque
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from vllm_wt_plugin.errors import RequestError, ServerUnreachable

CONNECT_S = 10.0
# Shorter than servers keep a connection (vLLM: 5 s): a request must not meet one being closed.
KEEP_ALIVE_S = 2.0


class Connections:
    """Thread-safe: each request has a connection to itself, which the next one takes over.

    `timeout_s` bounds each wait on the socket, and with CONNECT_S the one to connect. TLS
    certificates are checked against those that the system trusts. No proxies, no redirects.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s
        try:
            address = urlsplit(url)
            self._port = address.port
        except ValueError:
            address = urlsplit("")
        if address.scheme not in ("http", "https") or not address.hostname or not _plain(url):
            raise RequestError(
                f"{url!r} is not a server's address", next_step="use http://host:port"
            )
        self._host, self._path = address.hostname, address.path
        secure = address.scheme == "https"
        self._kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self._idle: deque[tuple[http.client.HTTPConnection, float]] = deque()  # since when

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str],
        sent: Callable[[], object] = lambda: None,
    ) -> tuple[int, bytes]:
        """Status and content of the answer. Blocking; `sent` is called before the wait for it.
        Raises ServerUnreachable, which is `heard` if the server got the request and did not answer
        in time."""
        connection, heard, whole = self._take(), False, False
        try:
            if connection.sock is None:
                self._open(connection)
            connection.request(method, self._path + path, body, headers)
            heard = True
            sent()
            response = connection.getresponse()
            status, content = response.status, response.read()
            whole = connection.sock is not None  # else the server closes it
        except TimeoutError as exc:
            error = ServerUnreachable(
                f"no answer in time to {method} {path}",
                where=self._url,
                next_step="look at the server's log; raise timeout_s if it is only slow",
            )
            error.heard = heard
            raise error from exc
        except (OSError, http.client.HTTPException) as exc:
            raise ServerUnreachable(
                f"{method} {path}: {str(exc) or type(exc).__name__}",
                where=self._url,
                next_step="check that the server runs and the address is right",
            ) from exc
        finally:  # after an interrupt too, what comes next on it would be no answer of ours
            if whole:
                self._idle.append((connection, time.monotonic()))
            else:
                connection.close()
        return status, content

    def _take(self) -> http.client.HTTPConnection:
        """The connection used last, if the server has not closed it; else a new one."""
        while self._idle:
            try:
                connection, since = self._idle.pop()
            except IndexError:  # another thread has taken it
                break
            if time.monotonic() - since < KEEP_ALIVE_S and not _readable(connection):
                return connection
            connection.close()
        return self._kind(self._host, self._port, timeout=min(CONNECT_S, self._timeout_s))

    def _open(self, connection: http.client.HTTPConnection) -> None:
        connection.connect()
        connection.sock.settimeout(self._timeout_s)

    def close(self) -> None:
        """Of requests under way the connections stay until they end. Idempotent."""
        while self._idle:
            self._idle.pop()[0].close()


def _plain(url: str) -> bool:
    return url.isascii() and url.isprintable() and " " not in url


def _readable(connection: http.client.HTTPConnection) -> bool:
    """Of an idle connection: it was closed, or something came that nobody asked for."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))
