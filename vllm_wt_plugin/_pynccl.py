"""vLLM's own NCCL communicator, for a worker and for a trainer of its protocol.

vLLM turns PyNccl off in silence where it cannot load NCCL, or one that lacks a function it calls:
such a communicator sends nothing. Here that is an error, before anyone waits for it.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_wt_plugin.errors import UnsupportedVLLM
from vllm_wt_plugin.transport.pynccl import Make


def load() -> Make:
    """How a worker makes its end: as vLLM's own `nccl` engine does, given the id. Blocking,
    collective. Raises UnsupportedVLLM."""
    _check_library()
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    def make(unique_id: bytes, rank: int, world_size: int, device: torch.device) -> Any:
        return uid_init_process_group(unique_id, rank, world_size, device.index)

    return make


def open_group(host: str, port: int, world_size: int) -> Any:
    """A trainer's end, rank 0: vLLM's `PyNcclCommunicator` on the current device. Blocking until
    all workers are there. Raises UnsupportedVLLM, RuntimeError."""
    _check_library()
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init({"master_address": host, "master_port": port, "world_size": world_size})


def _check_library() -> None:
    try:
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        NCCLLibrary()
    except ImportError as exc:
        raise UnsupportedVLLM(
            "vLLM is not installed here, whose NCCL protocol this is",
            next_step='install it, or push with WeightSync(url, backend="nccl")',
        ) from exc
    except (OSError, AttributeError, ValueError) as exc:  # no library, none of its functions
        raise UnsupportedVLLM(
            f"vLLM cannot use the NCCL it finds: {exc}",
            next_step="set VLLM_NCCL_SO_PATH to an NCCL as new as this vLLM asks for (2.29.7 for "
            '0.32), or push with WeightSync(url, backend="nccl"), which uses torch\'s',
        ) from exc
