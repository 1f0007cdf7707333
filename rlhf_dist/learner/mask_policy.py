"""The policy as it was some steps ago, whole on every rank: what it found likely is what the policy may choose."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from rlhf_dist.algo.action_mask import ActionMask
from rlhf_dist.algo.algorithm import LaggingMask
from rlhf_dist.config.schema import ModelConfig
from rlhf_dist.learner.checkpoint_files import MASK_FOLDER
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.models.attention import choose_attention
from rlhf_dist.models.hf import Companions, copy_weights, load_model, own_memory, save_hf
from rlhf_dist.models.packed_policy import PackedPolicy


class MaskPolicy:
    """One rank's copy, without gradients."""

    def __init__(self, source: str | Path, model: ModelConfig, lag: LaggingMask, *, device: str) -> None:
        """Load the Hugging Face directory `source`. Raises ModelError."""
        loaded = load_model(source, model.dtype, choose_attention(model.attention, device, model.dtype))
        self._policy = PackedPolicy(loaded.to(device))  # pyright: ignore[reportArgumentType]
        self._policy.requires_grad_(False)
        own_memory(self._policy)
        self._lag = lag

    def mask(self, packed: Packed) -> ActionMask:
        """What may be drawn at the rows' tokens with a loss."""
        return self._policy.action_mask(packed.tokens, packed.cu_seqlens, packed.predict, self._lag.top_p)

    def follow(self, version: int, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take the policy's weights, those of `version`, if it is time. Every rank calls it, since it gathers."""
        if self._lag.follows(version):
            copy_weights(self._policy.model, weights)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """By name; every rank holds the same."""
        yield from self._policy.model.named_parameters()

    def save(self, companions: Companions, folder: Path) -> None:
        """A Hugging Face directory in `folder`; rank 0's is enough. Raises `DiskError`."""
        save_hf(self._policy.model, companions, folder / MASK_FOLDER)
