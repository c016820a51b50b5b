"""An exponential moving average of a network's weights. Knows no training loop."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Keeps `decay` of the average at each update and takes the rest from the network; less of the average at first."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.state = {key: value.detach().clone() for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the network's present weights; whole numbers are copied."""
        self.updates += 1
        keep = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - keep)
            else:
                self.state[key].copy_(value)

    def restore(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Goes on from a stored average."""
        self.updates = updates
        for key, value in state.items():
            self.state[key].copy_(value)
