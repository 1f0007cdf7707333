"""A moving average of the policy's weights, kept by rank 0 and saved beside them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rlhf_dist.learner.checkpoint_files import EMA_FOLDER
from rlhf_dist.models.hf import Companions, load_model, save_hf


class Ema:
    """average <- decay x average + (1 - decay) x weights, once a training step; float32, on the CPU."""

    def __init__(self, decay: float, rank: int) -> None:
        self._decay = decay
        self._rank = rank
        self._average: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Move towards the weights; the first ones are taken whole. Every rank calls it and reads to the end."""
        for name, tensor in weights:
            if self._rank:
                continue
            if name in self._average:
                self._average[name].lerp_(tensor.detach().float().cpu(), 1.0 - self._decay)
            else:
                self._average[name] = tensor.detach().float().cpu().clone()

    def save(self, companions: Companions, folder: Path) -> None:
        """A Hugging Face directory `folder/hf_ema`; rank 0 only. Raises `DiskError`."""
        if self._rank == 0 and self._average:
            save_hf(iter(self._average.items()), companions, folder / EMA_FOLDER)

    def restore(self, folder: Path) -> None:
        """What `save` wrote, if anything; it may have been switched on since."""
        if self._rank == 0 and (folder / EMA_FOLDER).is_dir():
            model = load_model(folder / EMA_FOLDER, "float32", "eager")
            self._average = {name: parameter.detach() for name, parameter in model.named_parameters()}
