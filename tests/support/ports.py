"""Ports for servers that bind them later, and again after a restart."""

from __future__ import annotations

import random
import socket

RANGE = range(15_000, 32_000)  # below what the system gives to clients, which would take it


def free_port() -> int:
    """One of this machine's that nobody listens on."""
    while True:
        port = random.choice(RANGE)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
