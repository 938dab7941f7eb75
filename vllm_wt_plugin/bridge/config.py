"""What a bridge is told: where the server is, which model, which part this process plays."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any, Self

import torch

from vllm_wt_plugin.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class BridgeConfig:
    """Settings of one trainer process. `from_training_config` reads them off another object."""

    trainer_rank: int = 0
    world_size: int = 1  # trainer processes
    init_method: str = "env://"  # rendezvous of the trainers among themselves
    num_inference_nodes: int = 0  # 0: engine and trainer share this host
    model_name: str = ""  # a folder or name that transformers reads; "": what the server serves
    device: str = "cuda"  # where the trainer computes: the engine's device
    timeout_seconds: float = 300.0  # of each wait
    log_dir: str | None = None  # where the server wrote `vllm_bridge_config.json`
    vllm_api_url: str = "http://localhost:9001"
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
