"""Credit by token for one rank's rows: rewards from scores and KL, then the algorithm's own estimate. Pure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from rlhf_dist.algo.algorithm import TokenCredit
from rlhf_dist.algo.rewards import token_rewards
from rlhf_dist.learner.micro_batch_rows import Packed, pack_batch
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.token_sums import Estimate


def estimate(batch: RankBatch, values: np.ndarray, credit: TokenCredit, kl_in_reward: bool) -> Estimate:
    """Advantages and returns of each of the batch's N sampled tokens; `values`: float32 [N].

    The reward of a token is -kl_coef x (sampled logprob - reference logprob) where `kl_in_reward`, and the last one's
    has the score besides. The sampler's logprobs are those of the policy that acted, so this is the reward it earned.
    What the policy read between two turns is no time: credit goes from sampled token to sampled token.
    """
    lengths = batch.lengths
    if not len(lengths):
        nothing = np.empty(0, np.float32)
        return Estimate(nothing, nothing, nothing)
    kl = batch.sampled - batch.reference if kl_in_reward and len(batch.reference) else np.zeros(len(values), np.float32)
    mask = np.arange(lengths.max()) < lengths[:, None]
    mask_BT = torch.from_numpy(mask)
    scores_B = torch.from_numpy(batch.scores.astype(np.float32))
    rewards_BT = token_rewards(scores_B, padded(kl, mask), mask_BT, batch.kl_coef if kl_in_reward else 0.0)
    advantages_BT, returns_BT = credit.estimate(rewards_BT, padded(values, mask), mask_BT)
    return Estimate(advantages_BT.numpy()[mask], returns_BT.numpy()[mask], values)


def padded(values: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    """[N], row after row -> float32 [B, T], 0 beyond a row's end."""
    out = np.zeros(mask.shape, np.float32)
    out[mask] = values
    return torch.from_numpy(out)


def measure(batch: RankBatch, device: torch.device, measured: Callable[[Packed], torch.Tensor]) -> np.ndarray:
    """One pass over all rows without a gradient, by micro-batches; float32 [N, ...].

    `measured`: packed rows -> float32 [n, ...], what is wanted of each of their tokens with a loss. An empty
    micro-batch is run, too: the other ranks wait for it.
    """
    parts, places = [], []
    with torch.no_grad():
        for chosen in (chosen for micro_batches in batch.updates for chosen in micro_batches):
            found = measured(pack_batch(batch, chosen, device)).float().cpu().numpy()
            places.append(batch.places(chosen))
            parts.append(found[: len(places[-1])])  # of the placeholder nothing
    out = np.empty_like(np.concatenate(parts))
    out[np.concatenate(places)] = np.concatenate(parts)
    return out
