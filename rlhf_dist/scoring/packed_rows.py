"""Token rows laid end to end for a forward pass without gradients, in passes of a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized

import numpy as np
import torch
from torch import Tensor

from rlhf_dist.data.packing import pack


def passes(rows: Sequence[np.ndarray], budget_tokens: int) -> Iterator[np.ndarray]:
    """Which rows (int64 indices) go into one pass together: at most `budget_tokens`, a longer row alone."""
    return iter(pack(np.array([len(row) for row in rows], np.int64), budget_tokens))


def laid(rows: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, Tensor]:
    """(tokens int64 [T], boundaries int32 [S + 1]) of rows int32 [length], none empty."""
    tokens = torch.from_numpy(np.concatenate(rows).astype(np.int64))
    return tokens.to(device), torch.from_numpy(boundaries(rows).astype(np.int32)).to(device)


def boundaries(rows: Sequence[Sized]) -> np.ndarray:
    """int64 [S + 1]; row s lies at boundaries[s]:boundaries[s + 1]."""
    return np.concatenate([[0], np.cumsum([len(row) for row in rows])])
