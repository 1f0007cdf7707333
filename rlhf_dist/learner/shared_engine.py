"""The policy's engine where the critic shares its trunk: a value head is trained, saved and restored along."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from rlhf_dist.learner.checkpoint_files import HEAD_FILE
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.model_engine import PREFIX, ModelEngine
from rlhf_dist.models.actor_critic import PackedActorCritic
from rlhf_dist.models.packed import PackedModel
from rlhf_dist.models.tensors import read_tensors, write_tensors

HEAD = "value_head."


class SharedEngine(ModelEngine):
    """One rank. What it publishes and saves as `hf` is the language model alone."""

    def __init__(self, *args: Any, resumed: Path | None = None, **kwargs: Any) -> None:
        """As `ModelEngine`; `resumed`: the checkpoint whose value head goes on. Without it the head starts at zero."""
        self._resumed = resumed
        super().__init__(*args, **kwargs)

    def _packed(self, model: PreTrainedModel, gradient_checkpointing: bool) -> PackedModel:
        packed = PackedActorCritic(model, gradient_checkpointing)
        if self._resumed is not None:
            packed.value_head.load_state_dict(read_tensors(self._resumed / HEAD_FILE))
        return packed

    def values(self, packed: Packed) -> Tensor:
        """Of the tokens with a loss, float32 [N], row after row; not under the mask, which has no part in them."""
        return self._forward(packed, 1.0, "none", False)[2]

    def with_values(self, packed: Packed, temperature: float, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """As `logprobs_and_entropy`, and the values of the same pass."""
        return self._forward(packed, temperature, "gradient" if gradient else "value", True)

    def logprobs(self, packed: Packed, temperature: float, masked: bool = True) -> Tensor:
        """See `ModelEngine.logprobs`; the value head has no part in it, and a gradient of zero."""
        logprobs, _, values = self._forward(packed, temperature, "none", masked)
        return logprobs + 0.0 * values

    def logprobs_and_entropy(self, packed: Packed, temperature: float, gradient: bool = False) -> tuple[Tensor, Tensor]:
        """See `ModelEngine.logprobs_and_entropy`; the same of the value head."""
        logprobs, entropy, values = self.with_values(packed, temperature, gradient)
        return logprobs + 0.0 * values, entropy

    def weights(self, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """As `Engine.weights`, and nothing is gathered behind the last: a reader that stops there would be alone."""
        count = sum(name.startswith(PREFIX) for name, _ in self._deepspeed.shapes())
        return islice(super().weights(wanted), count if wanted is None else len(wanted))

    def save(self, folder: Path) -> None:
        """As `ModelEngine.save`, with `value_head.safetensors`."""
        super().save(folder)
        # Under ZeRO 3 gathering is collective: every rank reads all of them.
        head = {n.removeprefix(HEAD): t.cpu().clone() for n, t in self._deepspeed.named_weights() if n.startswith(HEAD)}
        if self.rank == 0:
            write_tensors(head, folder / HEAD_FILE)
