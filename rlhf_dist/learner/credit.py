"""Credit by token for one rank's rows: rewards from scores and KL, then the algorithm's own estimate. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from rlhf_dist.algo.algorithm import TokenCredit
from rlhf_dist.algo.rewards import token_rewards
from rlhf_dist.learner.rows import PLACEHOLDER, Row
from rlhf_dist.learner.shard import Estimate, Shard, by_sample, sampled_logprobs
from rlhf_dist.types import Group


def estimate(
    shard: Shard,
    groups: Sequence[Group],
    references: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    credit: TokenCredit,
    kl_in_reward: bool,
) -> Estimate:
    """Advantages and returns of each sampled token of the shard.

    The reward of a token is -kl_coef x (rollout logprob - reference logprob) where `kl_in_reward`, and the last one's
    has the score besides. The sampler's logprobs are those of the policy that acted, so this is the reward it earned.

    Args:
        references: G arrays float32 [sampled tokens of the group], or none.
        values: b arrays float32 [N], one for each row of the shard.
    """
    lengths = np.array([len(row) for row in values], np.int64)
    if not len(values):
        nothing = np.empty(0, np.float32)
        return Estimate(nothing, nothing, nothing)
    kl = [np.zeros(length, np.float32) for length in lengths]
    if kl_in_reward and references:
        sampled, reference = sampled_logprobs(shard, groups), by_sample(shard, groups, references)
        kl = [ours - theirs for ours, theirs in zip(sampled, reference, strict=True)]
    mask = np.arange(lengths.max()) < lengths[:, None]
    mask_BT = torch.from_numpy(mask)
    scores_B = torch.from_numpy(shard.scores.astype(np.float32))
    rewards_BT = token_rewards(scores_B, padded(kl, mask), mask_BT, shard.kl_coef if kl_in_reward else 0.0)
    advantages_BT, returns_BT = credit.estimate(rewards_BT, padded(values, mask), mask_BT)
    return Estimate(advantages_BT.numpy()[mask], returns_BT.numpy()[mask], np.concatenate(list(values)))


def padded(rows: Sequence[np.ndarray], mask: np.ndarray) -> torch.Tensor:
    """Ragged rows -> float32 [B, T], 0 beyond a row's end."""
    out = np.zeros(mask.shape, np.float32)
    out[mask] = np.concatenate(list(rows))
    return torch.from_numpy(out)


def measure(
    updates: Sequence[Sequence[np.ndarray]], rows: Sequence[Row], measured: Callable[[Sequence[Row]], torch.Tensor]
) -> list[np.ndarray]:
    """One pass over all rows without a gradient, by micro-batches; float32 [N, ...] for each row.

    `measured`: rows -> float32 [N, ...], what is wanted of each token with a loss. An empty micro-batch is run,
    too: the other ranks wait for it.
    """
    found = [np.empty(0, np.float32)] * len(rows)
    with torch.no_grad():
        for chosen in (chosen for micro_batches in updates for chosen in micro_batches):
            batch = [rows[i] for i in chosen] or [PLACEHOLDER]
            parts = by_row(measured(batch).float().cpu().numpy(), [row.length for row in batch])
            for i, part in zip(chosen, parts, strict=False):
                found[i] = part
    return found


def by_row(values: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """[N] -> one array a row."""
    return np.split(values, np.cumsum(lengths)[:-1]) if len(lengths) else []
