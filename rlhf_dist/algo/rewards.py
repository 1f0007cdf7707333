"""Rewards of tokens, and what is done to scores before they become rewards."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_dist.algo.masking import EQUAL_SCORES, at_least_float32
from rlhf_dist.config.schema import ShapingConfig
from rlhf_dist.errors import ConfigError


def token_rewards(score_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token: r_t = -kl_coef kl_t, and at the row's last response token the score as well.

    InstructGPT (arXiv:2203.02155), equation 2, token by token.

    Args:
        score_B: [B] one score a response.
        kl_BT: [B, T] estimate of the KL to the reference at each token, nats (k1: logprob less reference logprob).
        mask_BT: [B, T] true (or 1) at response tokens that the policy chose.
        kl_coef: in the unit of the scores per nat.

    Returns:
        [B, T] float32 (float64 for float64 input), 0 where masked out, whatever `kl_BT` is there. A row without
        response tokens is all 0: there is no token that could have earned its score.
    """
    assert score_B.shape == kl_BT.shape[:1] and kl_BT.shape == mask_BT.shape, (score_B.shape, kl_BT.shape)
    mask_BT = mask_BT.bool()
    tokens_from_here_BT = mask_BT.flip(1).cumsum(1).flip(1)
    penalty_BT = kl_coef * at_least_float32(kl_BT).masked_fill(~mask_BT, 0.0)
    score_BT = at_least_float32(score_B)[:, None].expand_as(kl_BT)
    return score_BT.masked_fill(~(mask_BT & (tokens_from_here_BT == 1)), 0.0) - penalty_BT


@dataclass(frozen=True, slots=True)
class RunningMoments:
    """Mean and deviation of all numbers seen. `dataclasses.asdict` is its state as JSON; `RunningMoments(**state)`."""

    count: int = 0
    """Numbers seen."""
    mean: float = 0.0
    """Their mean; 0 before the first."""
    m2: float = 0.0
    """Sum of squared distances from the mean."""

    @property
    def std(self) -> float:
        """Population standard deviation: sqrt(m2 / count); 0 for one number or none."""
        return math.sqrt(self.m2 / self.count) if self.count else 0.0

    def update(self, x: Tensor) -> RunningMoments:
        """With the numbers of x (any shape, all finite) as well, whatever batches they come in.

        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
        """
        x = x.detach().double()
        assert bool(x.isfinite().all()), "a score that is not finite would spoil the moments for good"
        if not x.numel():
            return self
        count = self.count + x.numel()
        mean, m2 = float(x.mean()), float((x - x.mean()).square().sum())
        distance = mean - self.mean
        return RunningMoments(
            count=count,
            mean=self.mean + distance * x.numel() / count,
            m2=self.m2 + m2 + distance * distance * self.count * x.numel() / count,
        )


def clip_scores(scores: Tensor, clip: float) -> Tensor:
    """Cut to +-clip, any shape; 0 is off."""
    if clip < 0:
        raise ConfigError(f"the score clip is {clip}: give a bound above 0, or 0 for none")
    return scores.clamp(-clip, clip) if clip else scores


def soft_overlong_penalty(length: Tensor, max_length: int, buffer: int) -> Tensor:
    """What a response loses for being nearly too long: from 0 in a straight line to -1 over the last `buffer` tokens.

        0                                         length <= max_length - buffer
        (max_length - buffer - length) / buffer   up to max_length
        -1                                        beyond

    DAPO's soft overlong punishment (arXiv:2503.14476); to be added to the score, times a weight of the
    caller's.

    Args:
        length: [B] response tokens.
        max_length: the longest that is wanted, tokens.
        buffer: tokens before it where the loss begins, above 0 and at most `max_length`.

    Returns:
        [B] float32 (float64 for float64 lengths), -1 to 0.
    """
    if not 0 < buffer <= max_length:
        raise ConfigError(
            f"the overlong buffer is {buffer} tokens and the longest response {max_length}: "
            "give a buffer above 0 and no longer than that"
        )
    return (at_least_float32(max_length - buffer - length) / buffer).clamp(-1.0, 0.0)


def repetition_penalty(distinct_B: Tensor, coef: float) -> Tensor:
    """What a response loses for repeating itself: -coef (1 - distinct).

    Args:
        distinct_B: [B] share of a response's neighbouring word pairs that differ from each other, 0 to 1: distinct-2
            (Li et al., arXiv:1510.03055), as `scoring/diversity.py` counts it.
        coef: 0 or more, in the unit of the scores.

    Returns:
        [B] float32 (float64 for float64 shares), -coef to 0; 0 where no pair comes twice.
    """
    if not coef >= 0:
        raise ConfigError(f"the coefficient of the repetition penalty is {coef}: give 0 or more")
    assert bool(((distinct_B >= 0) & (distinct_B <= 1)).all()), distinct_B
    return coef * (at_least_float32(distinct_B) - 1.0)


def length_normalized(score_B: Tensor, length_B: Tensor) -> Tensor:
    """Score by response token: s_i / length_i, so that a sum over tokens pays no longer for length alone.

    SimPO (arXiv:2405.14734) does it to a sum of logprobs. For a score that is not such a sum it favours short responses
    where scores are above 0, and long ones where they are below.

    Args:
        score_B: [B] one score a response.
        length_B: [B] response tokens, 0 or more.

    Returns:
        [B] float32 (float64 for float64 scores), in the unit of the scores per token; a response without tokens keeps
        its score.
    """
    assert score_B.shape == length_B.shape and bool((length_B >= 0).all()), (score_B.shape, length_B)
    score_B = at_least_float32(score_B)
    return score_B / length_B.to(score_B.dtype).clamp(min=1)


def shape_scores(
    scores_B: Tensor, ended_B: Tensor, shaping: ShapingConfig, moments: RunningMoments
) -> tuple[Tensor, RunningMoments]:
    """Scores of a step as the algorithm gets them: penalty for a missing end token, then normalised, then cut.

        scale:    s / std of all scores seen        (TRL's use_score_scaling)
        running:  (s - mean) / std of all scores seen, clipped    (PPO-max, "Secrets of RLHF", arXiv:2307.04964)
        batch:    (s - mean) / std of this step's

    "All seen" has this step's in it, with their penalties. Where the scores so far are equal (`EQUAL_SCORES`; so are
    those of a first single response) there is no scale to divide by, and they are divided by 1. Deviations are
    population deviations.

    Args:
        scores_B: [B] of the whole step, over all ranks; finite.
        ended_B: [B] true where the response has its end token.
        shaping: the config's section.
        moments: of the scores before this step.

    Returns:
        (shaped scores [B], float32 or float64; the moments with this step's scores, whatever `normalize` is).
    """
    assert scores_B.ndim == 1 and scores_B.shape == ended_B.shape, (scores_B.shape, ended_B.shape)
    scores_B = at_least_float32(scores_B)
    scores_B = torch.where(ended_B.bool(), scores_B, scores_B - shaping.missing_end_penalty)
    moments = moments.update(scores_B)
    match shaping.normalize:
        case "off":
            shaped_B = scores_B
        case "scale":
            shaped_B = scores_B / _divisor(moments)
        case "running":
            shaped_B = (scores_B - moments.mean) / _divisor(moments)
        case "batch":
            step = RunningMoments().update(scores_B)
            shaped_B = (scores_B - step.mean) / _divisor(step)
        case kind:
            raise ConfigError(f"score normalisation {kind!r} is unknown: one of off, scale, running, batch")
    return clip_scores(shaped_B, shaping.clip), moments


def _divisor(moments: RunningMoments) -> float:
    equal = moments.std <= EQUAL_SCORES * max(1.0, abs(moments.mean))
    return 1.0 if equal else moments.std
