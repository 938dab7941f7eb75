"""The engines of a job's inference nodes, which have the weights in memory of their own."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from torch import Tensor, nn

from vllm_wt_plugin.bridge.config import BridgeConfig
from vllm_wt_plugin.trainer.client import HTTPClient
from vllm_wt_plugin.trainer.sync import WeightSync


class InferenceNodes:
    """One server on each node, reached by HTTP; the weights are broadcast by the `nccl` transport
    from the first node of the job, where trainer rank 0 runs.

    Raises RequestError where nobody tells the nodes. `meet`: the trainers' own rendezvous.
    """

    def __init__(self, config: BridgeConfig, token: str | None) -> None:
        tensors, control, _, nodes = config.urls
        api = urlsplit(config.vllm_api_url)
        port = f":{api.port}" if api.port else ""
        urls = [f"{api.scheme}://{node}{port}" for node in nodes]
        self.meet = f"tcp://{control}"
        self.first = HTTPClient(urls[0], token=token, timeout_s=config.timeout_seconds)
        address, _, master_port = tensors.rpartition(":")
        self._sync = WeightSync(
            urls, token=token, timeout_s=config.timeout_seconds, backend="nccl",
            host=address, port=int(master_port), sender=config.trainer_rank == 0,
        )  # fmt: skip

    def check(self) -> None:
        """Raises ServerUnreachable, naming the node."""
        self._sync.status()

    def push(self, weights: nn.Module | Mapping[str, Tensor], version: str | int) -> None:
        """To all engines, by rank 0; the other ranks take part where the weights are sharded.
        Blocking; raises on rank 0 what the first failing engine says."""
        self._sync.push(weights, version)

    def close(self) -> None:
        """Idempotent. Engines that are gone are left alone."""
        self._sync.close()
        self.first.close()
