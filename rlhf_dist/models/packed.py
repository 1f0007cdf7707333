"""What every model on packed rows shares: a trunk that takes sequences laid end to end, without dropout."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


class PackedModel(torch.nn.Module):
    """Wraps a Hugging Face model of any head; its parameters are `model.*`.

    Weights are only ever used by calling the modules that own them, so ZeRO-3 can gather them. Dropout is turned off
    for good: the engine that samples has none, and with it the two would disagree on every log-probability.
    """

    def __init__(self, model: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = model
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

    def hidden(self, tokens: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        """Last hidden states [T, hidden] of a packed row.

        tokens int64 [T], the sequences one after another; cu_seqlens int32 [S + 1], their boundaries (0 first, T
        last, none empty).
        """
        lengths = cu_seqlens.diff()
        starts = torch.repeat_interleave(cu_seqlens[:-1], lengths, output_size=tokens.shape[0])
        positions = torch.arange(tokens.shape[0], device=tokens.device) - starts
        longest = int(lengths.max())
        output: Any = self.model.base_model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            cu_seq_lens_q=cu_seqlens,
            cu_seq_lens_k=cu_seqlens,
            max_length_q=longest,
            max_length_k=longest,
        )
        return output.last_hidden_state[0]
