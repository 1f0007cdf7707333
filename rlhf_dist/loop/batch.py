"""The experiences of a training step as rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Batch:
    """The experiences of one training step, by rows (one row is one sample). No tokens, only references to them."""

    keys: tuple[str, ...]
    """G, of the groups' requests, in the order of the groups."""
    uids: tuple[str, ...]
    """G, of their prompts."""
    groups: np.ndarray
    """int64 [B]; row -> group."""
    samples: np.ndarray
    """int64 [B]; row -> sample within its group."""
    tokens: np.ndarray
    """int64 [B]; all tokens of the row."""
    lengths: np.ndarray
    """int64 [B]; the sampled ones."""
    longest: np.ndarray
    """int64 [B]; those of the row's longest response."""
    ended: np.ndarray
    """bool [B]; false for a response that was cut before its end token."""
    scores: np.ndarray
    """float32 [B]; total reward as scored."""
    distinct: np.ndarray
    """float32 [B]; as `Scores.distinct`."""
    baselines: np.ndarray
    """float32 [B]; as `Experience.baseline`."""
    compared: bool
    """Whether there is a reference, and the collator has its logprobs."""
    kl: np.ndarray
    """float32 [B]; nats per response to the reference; 0 in a run without one."""
    oldest_version: int
    """Lowest weight version among the sampled tokens."""
