"""Which rows of a batch reach the optimizer, and how often: read from the training itself, not from its plan.

Each row has a scalar w. The loss of a micro-batch gets w - w for each of its rows, the second without a gradient. That
is exactly 0: losses, gradients and weights are the same with it, bit for bit. The gradient of w is 1 whenever the row
was in a micro-batch whose backward pass ran, whatever its advantage, and whether or not its loss was clipped or masked.
It is counted when the optimizer steps, by a hook of the optimizer. What no step follows is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.learner.rank_batch import RankBatch


@dataclass(frozen=True, slots=True)
class Seen:
    """What one rank's optimizer took of a batch."""

    rows: tuple[tuple[str, int], ...]
    """b; which samples they are, as `RankBatch.origins`."""
    times: np.ndarray
    """float64 [b]; in how many optimizer steps each was."""


class Witness:
    """Of one rank."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float, device: torch.device) -> None:
        """From now on every `step` of the optimizer counts. `factor`: what a loss is multiplied by before its backward
        pass."""
        self._factor = factor
        self._device = device
        self._rows: tuple[tuple[str, int], ...] = ()
        self._times = self._scalars = torch.zeros(0)
        optimizer.register_step_post_hook(self._stepped)

    def begin(self, batch: RankBatch) -> None:
        """A batch is to be trained; what was seen of another is forgotten."""
        self._rows = batch.origins
        self._times = torch.zeros(len(self._rows), dtype=torch.float64, device=self._device)
        self.begin_step()

    def begin_step(self) -> None:
        """Micro-batches of another optimizer step follow. Gradients of one that was not taken are forgotten."""
        self._scalars = torch.zeros_like(self._times, requires_grad=True)

    def beside(self, loss: Tensor, chosen: np.ndarray) -> Tensor:
        """The loss of a micro-batch of the chosen rows, as large as it was."""
        scalars = self._scalars[torch.from_numpy(chosen).to(self._device)]
        return loss + (scalars - scalars.detach()).sum().to(loss.dtype)

    def seen(self) -> Seen:
        """What the optimizer took of the batch until now."""
        return Seen(self._rows, self._times.cpu().numpy())

    @torch.no_grad()
    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Under ZeRO 3 the optimizer steps part by part: the first part counts for all."""
        if self._scalars.grad is not None:
            self._times += self._scalars.grad / self._factor
            self._scalars.grad = None
