"""fp32 masters: the optimiser's own copies of parameters that are served in fewer bits."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


class Masters:
    """One fp32 parameter per trained parameter, in order. Owns their memory."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._served = [p for p in parameters if p.requires_grad]
        self.parameters = [nn.Parameter(p.detach().float().clone()) for p in self._served]

    def take_gradients(self) -> None:
        """Move the gradients, widened, from the served parameters to the masters."""
        for master, served in zip(self.parameters, self._served, strict=True):
            master.grad = None if served.grad is None else served.grad.float()
            served.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the served memory."""
        for master, served in zip(self.parameters, self._served, strict=True):
            served.copy_(master)
