"""Falcon on packed rows: transformers gives it attention classes of its own, to which one is added here."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_dist.models.attention import SEGMENTED, segmented, shared

FALCON = "falcon"
"""The model_type."""


def teach_falcon() -> None:
    """Make `segmented` known to transformers' Falcon."""
    # Only where a Falcon is loaded: this imports its whole module.
    from transformers.models.falcon.modeling_falcon import (
        FALCON_ATTENTION_CLASSES,
        FalconAttention,
        apply_rotary_pos_emb,
    )

    class SegmentedFalconAttention(FalconAttention):
        """The same weights and rotary positions, with attention within each segment."""

        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self,
            hidden_states: torch.Tensor,
            alibi: None,
            attention_mask: torch.Tensor | None,
            position_ids: torch.Tensor,
            position_embeddings: tuple[torch.Tensor, torch.Tensor],
            layer_past: Any = None,
            **_: Any,
        ) -> tuple[torch.Tensor, None]:
            assert alibi is None and layer_past is None, "models with ALiBi are refused, and nothing is cached"
            heads = self._split_heads(self.query_key_value(hidden_states))
            query, key, value = (part.transpose(1, 2) for part in heads)
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            mixed, _unused = shared(segmented, self, query, key, value, attention_mask, position_ids=position_ids)
            return self.dense(mixed.flatten(2)), None

    FALCON_ATTENTION_CLASSES[SEGMENTED] = SegmentedFalconAttention
