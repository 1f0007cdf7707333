"""What every model on packed rows shares: a trunk that takes sequences laid end to end, without dropout."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_dist.models.sequence_parallel import ALONE, ATTRIBUTE, SequenceGroup


class PackedModel(torch.nn.Module):
    """Wraps a Hugging Face model of any head; its parameters are `model.*`.

    Weights are only ever used by calling the modules that own them, so ZeRO-3 can gather them. Dropout is turned off
    for good: the engine that samples has none, and with it the two would disagree on every log-probability.
    """

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
        self.sequence = ALONE
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            # Many models keep theirs as plain numbers: attention_dropout, dropout, layerdrop, router_jitter_noise.
            for name, value in vars(module).items():
                if isinstance(value, float) and ("drop" in name or "jitter" in name):
                    setattr(module, name, 0.0)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers checkpoints in training mode only, and loads models in the other; without dropout they are alike.
        model.train()

    def share_rows(self, sequence: SequenceGroup) -> None:
        """Let the ranks of a group share the tokens of each row: all of them call `forward` with the same rows."""
        self.sequence = sequence
        for module in self.model.modules():
            setattr(module, ATTRIBUTE, sequence)

    def hidden(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Last hidden states [T, hidden] of a packed row; of one that ranks share, those of this rank's part.

        tokens int64 [T], the sequences one after another; cu_seqlens int32 [S + 1], their boundaries (0 first, T
        last, none empty).
        """
        tokens, cu_seqlens = self.sequence.padded(tokens, cu_seqlens)
        own = self.sequence.part(len(tokens))
        lengths = cu_seqlens.diff()
        starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=tokens.shape[0])
        positions = torch.arange(tokens.shape[0], device=tokens.device) - starts
        longest = int(lengths.max())
        output: Any = self.model.base_model(
            input_ids=tokens[None, own],
            position_ids=positions[None, own],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        return output.last_hidden_state[0]

    def hidden_at(
        self, tokens: torch.Tensor, cu_seqlens: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """(last hidden states at those of `positions` that are this rank's, where each rank's begin).

        positions int64 [M], ascending; without a group all are this rank's.
        """
        hidden = self.hidden(tokens, cu_seqlens)
        starts = self.sequence.starts(len(hidden), positions)
        return self.sequence.read(hidden, positions, starts), starts
