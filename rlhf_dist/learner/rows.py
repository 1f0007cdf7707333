"""Ragged rows and how they are packed into one forward pass. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.types import Trajectory


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence, and which of its tokens are learnt."""

    tokens: np.ndarray
    """int32 [T]."""
    loss_mask: np.ndarray
    """bool [T]; true for tokens with a loss. The first has none: nothing stands before it to predict it from."""

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.loss_mask), (len(self.tokens), len(self.loss_mask))
        assert self.loss_mask.any() and not self.loss_mask[0], "the first token has no loss, and one at least has"

    @property
    def length(self) -> int:
        """N; tokens with a loss."""
        return int(self.loss_mask.sum())


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows laid end to end for one forward pass; no padding, and no mask made from token ids."""

    tokens: Tensor
    """int64 [T]."""
    cu_seqlens: Tensor
    """int32 [S + 1]; row s is tokens[cu_seqlens[s]:cu_seqlens[s + 1]]."""
    predict: Tensor
    """int64 [N]; positions whose next token has a loss."""
    targets: Tensor
    """int64 [N]; those tokens, row after row."""


PLACEHOLDER = Row(np.zeros(2, dtype=np.int32), np.array([False, True]))
"""For a rank that has no rows left, so that every rank runs as many micro-batches; its weight is 0."""


def response_row(prompt: Sequence[int], response: Sequence[int]) -> Row:
    """A prompt without loss and a response with one."""
    tokens = np.array([*prompt, *response], np.int32)
    return Row(tokens, np.arange(len(tokens)) >= len(prompt))


def trajectory_row(sample: Trajectory) -> Row:
    """A sample of the policy: what it said is learnt, what it read is not."""
    return Row(sample.tokens, sample.loss_mask)


def pack_rows(rows: Sequence[Row], device: torch.device) -> Packed:
    """Lay rows end to end."""
    ends = np.cumsum([len(row.tokens) for row in rows])
    starts = np.concatenate([[0], ends[:-1]])
    predict = np.concatenate(
        [start + np.flatnonzero(row.loss_mask) - 1 for row, start in zip(rows, starts, strict=True)]
    )
    tokens = torch.from_numpy(np.concatenate([row.tokens for row in rows]).astype(np.int64))
    positions = torch.from_numpy(predict)
    return Packed(
        tokens=tokens.to(device),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device),
        predict=positions.to(device),
        targets=tokens[positions + 1].to(device),
    )


def spread(values: Sequence[float] | np.ndarray, rows: Sequence[Row], device: torch.device) -> Tensor:
    """One value a row -> float32 [N], one for each token with a loss."""
    lengths = [row.length for row in rows]
    return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.float32), lengths)).to(device)
