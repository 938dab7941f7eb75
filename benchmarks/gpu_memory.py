"""What is in use on the GPU: peaks while something runs, and leaks on either side of a push."""

from __future__ import annotations

import threading
from typing import Any

import torch

from vllm_wt_plugin import WeightSync
from vllm_wt_plugin.transport.cuda import _allocation


def used(device: int | None = None) -> int:
    """Bytes in use on the whole device (default: the current), by whichever process."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free


class MemoryPeak:
    """The device's used bytes above a start value, sampled every 2 ms while active."""

    def __init__(self, device: int | None = None) -> None:
        self._device = device

    def __enter__(self) -> MemoryPeak:
        torch.cuda.synchronize()
        self.start = self.peak = used(self._device)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, used(self._device))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.above = self.peak - self.start
        self.left = used(self._device) - self.start


def leaks(sync: WeightSync, model: Any, rounds: int = 100, moves: int = 5) -> dict[str, int]:
    """Bytes that `rounds` more pushes leave: on the device, in the trainer, in the worker, and
    mapped from the one into the other.

    In `moves` of the rounds one parameter has moved and its old memory was given back to CUDA: a
    worker that still mapped it would keep it in use.
    """
    moving = min((p for p in model.parameters() if p.numel() >= 1 << 22), key=torch.numel)

    def push(n: int, moves: int) -> dict[str, int]:
        for i in range(n):
            if i % (n // moves) == 0:
                moving.data = moving.data.clone()
            sync.push(model)
        torch.cuda.empty_cache()
        worker = sync.status()[0]["memory"][0]
        return {
            "device": used(),
            "trainer allocated": torch.cuda.memory_allocated(),
            "trainer reserved": torch.cuda.memory_reserved(),
            **{f"worker {k}": v for k, v in worker.items()},
        }

    before = push(2 * moves, moves)
    after = push(rounds, moves)
    return {k: after[k] - before[k] for k in after}


def opened(model: Any) -> int:
    """Bytes of the allocations in which a model's parameters lie: for views of another process's
    memory more than the weights, where its allocator has put other things beside them."""
    found = {_allocation(p.data_ptr(), p.device.index, "") for p in model.parameters()}
    return sum(size for _, size in found)
