"""Requests without pause, each of them judged: whose tokens they are, and whether they may be.

A version's weights can say two tokens alone, so that every token tells which weights made it; the
generate route says which version the server thinks that it was.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import torch

from tests.support.trainer import speaking, weights

HEAD = "lm_head.weight"
TOKENS = 30  # of each request
CYCLE = 120  # versions until the tokens come again


def says(version: int) -> tuple[int, int]:
    """The tokens that this version's weights make."""
    first = 10 + 2 * (version % CYCLE)
    return first, first + 1


class Model:
    """A trainer's tensors, which stay where they are and become those of any version."""

    def __init__(self) -> None:
        self.tensors = {n: t.clone() for n, t in weights(1).items()}
        self.become(0)

    def become(self, version: int, share: float = 0.004) -> None:
        """Seed 1's weights with a `share` of the elements of each matrix exchanged for others of
        the same matrix, and a head that says this version's tokens."""
        g = torch.Generator().manual_seed(version)
        for name, base in weights(1).items():
            flat = self.tensors[name].copy_(base).view(-1)
            if base.dim() > 1:
                at, other = torch.randint(flat.numel(), (2, int(flat.numel() * share)), generator=g)
                flat[at] = base.reshape(-1)[other]
        self.tensors[HEAD].copy_(speaking(1, *says(version))[HEAD])


class Ledger:
    """Versions that were begun, and that each server is known to have taken: by the trainer's word.

    `life` of a server counts its kills, and its starts thereafter: odd while it is down. Its first
    weights are version 0, named "default".
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.begun = 0
        self.done = dict.fromkeys(urls, 0)
        self.life = dict.fromkeys(urls, 0)


class Load:
    """`with Load(ledger, clients) as load`: so many requests at a time to each server."""

    def __init__(self, ledger: Ledger, clients: int) -> None:
        self.ledger, self.clients = ledger, clients
        self.counts: Counter[str] = Counter()
        self.flaws: list[str] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    async def _all(self) -> None:
        urls = [u for u in self.ledger.done for _ in range(self.clients)]
        await asyncio.gather(*(self._client(u, i) for i, u in enumerate(urls)))

    async def _client(self, url: str, number: int) -> None:
        # A connection for each request: a server that was stopped closes idle ones when it goes
        # on, with the request that has come meanwhile unread.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(timeout=150, limits=limits, trust_env=False) as http:
            turn = 0
            while not self._end.is_set():
                turn += 1
                if self.ledger.life[url] % 2:
                    await asyncio.sleep(0.1)
                    continue
                await self._one(http, url, [number + 5, turn % 250 + 5, turn // 250 + 5])

    async def _one(self, http: httpx.AsyncClient, url: str, prompt: list[int]) -> None:
        life, least = self.ledger.life[url], self.ledger.done[url]
        options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        body = {"token_ids": prompt, "sampling_params": options}
        self.counts["requests"] += 1
        try:
            answer = await http.post(f"{url}/inference/v1/generate", json=body)
        except httpx.TransportError as exc:
            if self.ledger.life[url] != life:
                self.counts["cut by a kill"] += 1
            else:
                self._flaw("lost", f"{url}: {exc!r}")
            return await asyncio.sleep(0.2)
        if answer.status_code == 503 and answer.json().get("code") == "EngineDirty":
            self.counts["refused by a dirty engine"] += 1
            return await asyncio.sleep(0.2)
        if answer.status_code != 200:
            return self._flaw("lost", f"{url}: {answer.status_code} {answer.text[:500]}")
        await self._judge(
            answer.json()["choices"][0], least if life == self.ledger.life[url] else 0
        )

    async def _judge(self, choice: dict[str, Any], least: int) -> None:
        """Each token is one version's, the one that its label names; versions go up, from the one
        that was there before the request to one that was begun."""
        tokens, at = choice["token_ids"], 0
        runs = choice["weight_versions"]
        for run in runs:
            version = 0 if run["version"] == "default" else int(run["version"])
            await self._begun(version)
            if run["start"] != at or not least <= version <= self.ledger.begun:
                self._flaw("mixed", f"{runs} after {least}, before {self.ledger.begun}")
            if not set(tokens[at : run["end"]]) <= set(says(version)):
                self._flaw("mixed", f"{runs}: {tokens}")
            at, least = run["end"], version
        if at != len(tokens) or at != TOKENS:
            self._flaw("mixed", f"{runs} of {len(tokens)} tokens")
        self.counts["answered"] += 1
        self.counts["answered by several versions"] += len(runs) > 1

    async def _begun(self, version: int) -> None:
        """The trainer's word may come later than the answer."""
        for _ in range(500):
            if version <= self.ledger.begun:
                return
            await asyncio.sleep(0.01)

    def _flaw(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        self.flaws.append(f"{kind}: {text}")

    def figures(self) -> dict[str, Any]:
        return {"lost": 0, "mixed": 0, **self.counts, "flaws": sorted(set(self.flaws))[-30:]}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join(200)
