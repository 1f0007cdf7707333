"""A policy with a value head beside its language head, on one trunk."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from rlhf_dist.algo.action_mask import ActionMask
from rlhf_dist.algo.logprobs import Entropy, chunked_logprobs
from rlhf_dist.models.packed_policy import PackedPolicy


class PackedActorCritic(PackedPolicy):
    """`PackedPolicy` with `value_head`, a linear layer that starts at zero, so that values start at 0."""

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        super().__init__(model, gradient_checkpointing)
        parameter = next(model.parameters())
        size = model.config.get_text_config().hidden_size
        self.value_head = torch.nn.Linear(size, 1, dtype=parameter.dtype, device=parameter.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        tokens: torch.Tensor,
        cu_seqlens: torch.Tensor,
        predict: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk: int,
        entropy: Entropy = "value",
        mask: ActionMask | None = None,
        least_chunks: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(logprobs, entropy or None, values), float32 [M] each; values are read where the logprobs are."""
        hidden, starts = self.hidden_at(tokens, cu_seqlens, predict)
        head, own, whole = self.output_head(), self.sequence.own(targets, starts), self.sequence.whole
        logprobs, entropies = chunked_logprobs(hidden, head, own, temperature, chunk, entropy, mask, least_chunks)
        values = self.value_head(hidden)[:, 0].float()
        return whole(logprobs, starts), None if entropies is None else whole(entropies, starts), whole(values, starts)
