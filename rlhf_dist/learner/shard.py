"""What the controller sends a learner rank: how to train its rows, and which they are. No tokens, and no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPlan:
    """How one rank's b rows are trained in a step. Made by the controller; no tokens, and nothing by token."""

    advantages: np.ndarray
    """float32 [b]; spread over the row's tokens. 0 where a critic's `Estimate` has them by token."""
    scores: np.ndarray
    """float32 [b]; the shaped score, reward of the row's last token where credit is by token."""
    weights: np.ndarray
    """float64 [b]; factor of each of the row's per-token losses, from global counts."""
    updates: tuple[tuple[np.ndarray, ...], ...]
    """[optimizer steps][micro-batches]: row numbers. As many on every rank; an empty one is run with weight 0."""
    epochs: int
    """Passes over `updates`."""
    first_update: int
    """Number of the first optimizer step in the whole run, from 0."""
    learning_rates: tuple[float, ...]
    """One for each optimizer step of all passes."""
    critic_rates: tuple[float, ...]
    """The critic's own, as many."""
    temperature: float
    """The sampler's, so that logprobs compare."""
    version: int
    """Of the learner's weights before the step."""
    kl_coef: float
    """Of the KL to the reference, as it stands at this step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(RankPlan):
    """A plan, and which samples its rows are: the rank makes its `RankBatch` from it and the step's groups."""

    groups: np.ndarray
    """int64 [b]; row -> position among the groups given beside the shard."""
    samples: np.ndarray
    """int64 [b]; row -> sample within its group."""
