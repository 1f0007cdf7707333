"""Ragged rows and how they are packed into one forward pass. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.types import Rollout


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence: a prompt and its response."""

    tokens: np.ndarray
    """int32 [P + R]."""
    prompt_length: int
    """P, at least 1: a response's first token is predicted from the prompt's last."""

    def __post_init__(self) -> None:
        assert 1 <= self.prompt_length < len(self.tokens), (self.prompt_length, len(self.tokens))

    @property
    def response_length(self) -> int:
        """R, tokens."""
        return len(self.tokens) - self.prompt_length


@dataclass(frozen=True, slots=True)
class Packed:
    """Rows laid end to end for one forward pass; no padding, and no mask made from token ids."""

    tokens: Tensor
    """int64 [T]."""
    cu_seqlens: Tensor
    """int32 [S + 1]; row s is tokens[cu_seqlens[s]:cu_seqlens[s + 1]]."""
    predict: Tensor
    """int64 [N]; positions whose next token is a response token."""
    targets: Tensor
    """int64 [N]; those tokens, row after row."""


PLACEHOLDER = Row(np.zeros(2, dtype=np.int32), 1)
"""For a rank that has no rows left, so that every rank runs as many micro-batches; its weight is 0."""


def rollout_row(rollout: Rollout, sample: int) -> Row:
    """One sample of a group as a row."""
    start, end = rollout.offsets[sample], rollout.offsets[sample + 1]
    return Row(np.concatenate([rollout.prompt_tokens, rollout.tokens[start:end]]), len(rollout.prompt_tokens))


def pack_rows(rows: Sequence[Row], device: torch.device) -> Packed:
    """Lay rows end to end."""
    ends = np.cumsum([len(row.tokens) for row in rows])
    starts = np.concatenate([[0], ends[:-1]])
    predict = np.concatenate(
        [np.arange(start + row.prompt_length - 1, end - 1) for row, start, end in zip(rows, starts, ends, strict=True)]
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
    """One value a row -> float32 [N], one a response token."""
    lengths = [row.response_length for row in rows]
    return torch.from_numpy(np.repeat(np.asarray(values, dtype=np.float32), lengths)).to(device)
