"""What a bridge is told: where the server is, which model, which part this process plays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch

from vllm_wt_plugin.bridge.helpers import (
    CONTROL_PORT,
    INFERENCE_PORT,
    TENSOR_PORT,
    Urls,
    get_inference_urls,
)
from vllm_wt_plugin.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Settings of one trainer process. `from_training_config` reads them off another object."""

    trainer_rank: int = 0
    world_size: int = 1  # trainer processes
    init_method: str = "env://"  # where the trainers meet; with inference nodes: on control_port
    num_inference_nodes: int = 0  # 0: engine and trainer share this host
    nodes: Sequence[str] | None = None  # of the job, inference nodes last; None: Slurm is asked
    tensor_port: int = TENSOR_PORT  # on the first node: where weights are broadcast from
    control_port: int = CONTROL_PORT  # on the first node
    inference_port: int = INFERENCE_PORT  # for `urls` alone: engines need no group of their own
    model_name: str = ""  # a folder or name that transformers reads; "": what the server serves
    device: str = "cuda"  # where the trainer computes: in local mode the engine's device
    timeout_seconds: float = 300.0  # of each wait
    log_dir: str | None = None  # where the server wrote `vllm_bridge_config.json`
    vllm_api_url: str = "http://localhost:9001"  # its scheme and port on every inference node
    use_cuda_ipc: bool = True  # get handles from the server; False: `attach_to_vllm_weights` first
    num_gpus_per_node: int = field(default_factory=torch.cuda.device_count)

    def __post_init__(self) -> None:
        if not 0 <= self.trainer_rank < self.world_size:
            raise RequestError(
                f"trainer_rank {self.trainer_rank} is not in [0, {self.world_size})",
                where="BridgeConfig.trainer_rank",
            )
        if self.num_inference_nodes < 0:
            raise RequestError("must not be negative", where="BridgeConfig.num_inference_nodes")
        if self.timeout_seconds <= 0:
            raise RequestError("must be positive", where="BridgeConfig.timeout_seconds")

    @property
    def is_local_mode(self) -> bool:
        """No inference nodes: the engine is on this host, reached over HTTP."""
        return self.num_inference_nodes == 0

    @property
    def urls(self) -> Urls:
        """See `get_inference_urls`. Raises RequestError without a node list."""
        return get_inference_urls(
            self.num_inference_nodes, self.nodes, tensor_port=self.tensor_port,
            control_port=self.control_port, inference_port=self.inference_port,
        )  # fmt: skip

    @classmethod
    def from_training_config(cls, config: Any) -> Self:
        """From any object with attributes of these names (missing ones: the default), and an
        optional `vllm_port`. `LOGDIR` gives `log_dir` where the object does not."""
        given = {
            f.name: getattr(config, f.name)
            for f in fields(cls)
            if getattr(config, f.name, None) is not None
        }
        given.setdefault("log_dir", os.environ.get("LOGDIR"))
        port = getattr(config, "vllm_port", None)
        if port is not None and "vllm_api_url" not in given:
            given["vllm_api_url"] = f"http://localhost:{port}"
        return cls(**given)
