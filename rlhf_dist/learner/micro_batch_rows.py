"""Ragged rows and how they are packed into one forward pass. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.learner.rank_batch import RankBatch, spans


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence to learn from as it is: a demonstration or a judged response."""

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
    offsets: Tensor
    """int64 [S + 1]; the tokens with a loss of row s are numbers offsets[s] to offsets[s + 1] of the N."""

    def spread(self, values: np.ndarray | Sequence[float]) -> Tensor:
        """One value a row -> float32 [N], one for each token with a loss."""
        by_row = torch.from_numpy(np.asarray(values, dtype=np.float32)).to(self.offsets.device)
        return by_row.repeat_interleave(self.offsets.diff())


NOTHING = np.zeros(2, np.int32), np.array([False, True]), np.array([2])
"""Tokens, mask and lengths for a rank that has no rows left: every rank runs as many passes. Its weight is 0."""


def response_row(prompt: Sequence[int], response: Sequence[int]) -> Row:
    """A prompt without loss and a response with one."""
    tokens = np.array([*prompt, *response], np.int32)
    return Row(tokens, np.arange(len(tokens)) >= len(prompt))


def pack_rows(rows: Sequence[Row], device: torch.device) -> Packed:
    """Rows for one forward pass; a placeholder for none."""
    if not rows:
        return pack(*NOTHING, device)
    lengths = np.array([len(row.tokens) for row in rows])
    masks = np.concatenate([row.loss_mask for row in rows])
    return pack(np.concatenate([row.tokens for row in rows]), masks, lengths, device)


def pack(tokens: np.ndarray, loss_mask: np.ndarray, lengths: np.ndarray, device: torch.device) -> Packed:
    """Rows of these lengths that lie end to end already: int [T], bool [T], int [S]."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    with_loss = np.flatnonzero(loss_mask)
    predict, ids = torch.from_numpy(with_loss - 1), torch.from_numpy(tokens.astype(np.int64))
    return Packed(
        tokens=ids.to(device),
        cu_seqlens=torch.from_numpy(edges.astype(np.int32)).to(device),
        predict=predict.to(device),
        targets=ids[predict + 1].to(device),
        offsets=torch.from_numpy(np.searchsorted(with_loss, edges)).to(device),
    )


def pack_batch(batch: RankBatch, chosen: np.ndarray, device: torch.device) -> Packed:
    """The chosen rows for one forward pass; a placeholder for none, since every rank runs as many passes."""
    if not len(chosen):
        return pack(*NOTHING, device)
    where = spans(batch.starts, chosen)
    return pack(batch.tokens[where], batch.loss_mask[where], np.diff(batch.starts)[chosen], device)


def on(device: torch.device, values: np.ndarray, places: np.ndarray) -> Tensor:
    """The values at these places, on the device."""
    return torch.from_numpy(values[places]).to(device)
