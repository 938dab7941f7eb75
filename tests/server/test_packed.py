"""Packed pushes: tensors through two small buffers, split where they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support import models
from tests.support.server import Server
from vllm_wt_plugin import EngineDirty, RequestError, WeightSync, as_source
from vllm_wt_plugin.wire.params import ParamSpec

pytestmark = pytest.mark.server
BUFFER = 16 * 1024  # smaller than the embedding, larger than any row


@pytest.fixture(scope="module")
def server(checkpoint: Callable[..., Path], serve: Callable[..., Server]) -> Server:
    return serve(checkpoint("qwen3", 0))


def test_same_bits_as_a_direct_push(server: Server) -> None:
    a, b = models.build("qwen3", 0), models.build("qwen3", 1)
    with WeightSync(server.url) as direct:
        direct.push(b)
        want = server.generations()
        direct.push(a)
        old = server.generations()
    with WeightSync(server.url, packed=True, buffer_bytes=BUFFER) as packed:
        for model, expected in ((b, want), (a, old), (b, want), (a, old)):
            report = packed.push(model)
            assert server.generations() == expected
            assert server.status()["version"] == report.version
    assert want != old


class Lying:
    """Announces what `inner` is, and yields something else from the middle on."""

    def __init__(self, inner: object, lie: str) -> None:
        self.inner, self.lie = as_source(inner), lie

    def specs(self) -> tuple[ParamSpec, ...]:
        return self.inner.specs()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        rows = list(self.inner)
        middle = len(rows) // 2
        name, tensor = rows[middle]
        if self.lie == "fewer":
            rows = rows[:middle]
        elif self.lie == "more":
            rows.append(("model.extra.weight", tensor))
        elif self.lie == "other name":
            rows[middle] = ("model.other.weight", tensor)
        else:
            rows[middle] = (name, tensor.float())
        yield from rows


@pytest.mark.parametrize("lie", ["fewer", "more", "other name", "other dtype"])
def test_a_source_that_breaks_its_word(server: Server, lie: str) -> None:
    """Nothing is committed; the engine says DIRTY, refuses requests, and the next push heals it."""
    a = models.build("qwen3", 0)
    with WeightSync(server.url) as direct:
        direct.push(a)
        old = server.generations()
        version = server.status()["version"]
        with (
            WeightSync(server.url, packed=True, buffer_bytes=BUFFER) as packed,
            pytest.raises(RequestError, match=r"announced|ended before"),
        ):
            packed.push(Lying(models.build("qwen3", 1), lie))
        status = server.status()
        assert (status["state"], status["version"]) == ("DIRTY", version)
        refused = server.complete([5, 6, 7])
        assert refused.status_code == 503
        assert refused.json()["code"] == EngineDirty.__name__
        direct.push(a)
        assert server.generations() == old


def test_a_row_larger_than_a_buffer_is_refused_before_anything_moves(server: Server) -> None:
    before = server.generations()
    with (
        WeightSync(server.url, packed=True, buffer_bytes=64) as packed,
        pytest.raises(RequestError, match="one row of this tensor has 128 bytes"),
    ):
        packed.push(models.build("qwen3", 1))
    assert server.status()["state"] == "IDLE"
    assert server.generations() == before
