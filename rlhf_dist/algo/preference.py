"""Learning from human judgements: losses of reward models and of policies, Elo ratings, calibration of a judge."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError

ELO_START = 1000.0
"""Rating before the first battle."""
ELO_SCALE = 400.0 / math.log(10.0)
"""Rating points per unit of a Bradley-Terry score: 400 points are odds of ten to one."""
ELO_PARTS = 16
"""`elo_ratings` spends the k of a battle in at least so many parts."""

Player = TypeVar("Player", bound=Hashable)


def bradley_terry_loss(chosen_B: Tensor, rejected_B: Tensor, margin: float | Tensor = 0.0) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) for each pair, nats.

    Bradley and Terry (1952); as the loss of a reward model: InstructGPT (arXiv:2203.02155). With a margin, how much
    better the chosen side has to be: Llama 2 (arXiv:2307.09288).

    Args:
        chosen_B: [B] scores of the better sides.
        rejected_B: [B] scores of the worse sides.
        margin: a number or [B], in the unit of the scores.

    Returns:
        [B] float32 (float64 for float64 scores); log 2 for equal scores without a margin.
    """
    return softplus(margin - (at_least_float32(chosen_B) - at_least_float32(rejected_B)))


def ranking_losses(
    scores_S: Tensor, better_P: Tensor, worse_P: Tensor, margin_P: Tensor, element_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Bradley-Terry losses of pairs of rows, and weights that make each judgement count as the mean over its pairs.

    InstructGPT (arXiv:2203.02155), section 3.5: the k (k - 1) / 2 pairs of a ranking of k responses are one batch
    element, divided by their number, and each response is scored once. The sum of loss x weight, divided by the
    elements of the optimizer step over all ranks, is the step's loss. All pairs of an element are in one call.

    Args:
        scores_S: [S] one score a row.
        better_P: [P] index of the row that was preferred.
        worse_P: [P] index of the other row.
        margin_P: [P] see `bradley_terry_loss`.
        element_P: [P] integers, the same for the pairs of one judgement.

    Returns:
        (losses [P] in nats; weights [P], 1 / the pairs of its element, without gradient, of the losses' dtype).
    """
    assert better_P.shape == worse_P.shape == margin_P.shape == element_P.shape, (better_P.shape, element_P.shape)
    losses_P = bradley_terry_loss(scores_S[better_P], scores_S[worse_P], margin_P)
    return losses_P, pair_weights(element_P).to(losses_P.dtype)


def pair_weights(element_P: Tensor) -> Tensor:
    """[P] float32: 1 / the pairs of its element; element_P [P] integers, the same for the pairs of one judgement."""
    _, element_P, pairs_E = torch.unique(element_P, return_inverse=True, return_counts=True)
    return pairs_E.float().reciprocal()[element_P]


def rating_loss(scores: Tensor, values: Tensor) -> Tensor:
    """Squared error of a score against a human's rating, (score - value)^2, each; any shape, the same for both."""
    return (at_least_float32(scores) - at_least_float32(values)).square()


def thumbs_loss(scores: Tensor, labels01: Tensor) -> Tensor:
    """Logistic loss of a score against thumbs up (1) or down (0), nats per label; any shape, the same for both.

    The probability of thumbs up is sigmoid(score): -log sigmoid(score) where the label is 1, else -log sigmoid(-score).
    """
    scores = at_least_float32(scores)
    return binary_cross_entropy_with_logits(scores, labels01.to(scores.dtype), reduction="none")


def elo_update(rating_a: float, rating_b: float, outcome: float, k: float = 32.0) -> tuple[float, float]:
    """Ratings after one battle: what a gains, k (outcome - expected), b loses.

    expected = 1 / (1 + 10^((rating_b - rating_a) / 400)); outcome 1: a won, 0: b won, 0.5: a tie. A. Elo, "The Rating
    of Chessplayers" (1978).
    """
    assert 0.0 <= outcome <= 1.0, outcome
    gain = k * (outcome - _expected(rating_a, rating_b))
    return rating_a + gain, rating_b - gain


def elo_ratings(battles: Iterable[tuple[Player, Player, float]], k: float = 32.0) -> dict[Player, float]:
    """Rating of each player from battles that have no order in time: (a, b, outcome) as in `elo_update`.

    All battles are one rating period, and the k of each is spent in equal parts: in a part every battle moves its
    players by that share of k, all of them from the ratings before the part. So the order of the battles does not
    matter, and players with the same record get the same rating. There are as many parts as the busiest player has
    battles, at least 16, so that no part overshoots. All start at 1000, which stays the mean; nobody's rating becomes
    infinite, as that of an unbeaten player would in a fit.
    """
    record: defaultdict[Player, defaultdict[Player, list[float]]] = defaultdict(lambda: defaultdict(list))
    for a, b, outcome in battles:
        assert a != b and 0.0 <= outcome <= 1.0, outcome
        record[a][b].append(outcome)
        record[b][a].append(1.0 - outcome)
    # Of each opponent: battles, points won. Sums by fsum are the same in any order, to the last bit.
    totals = {me: {other: (len(x), math.fsum(x)) for other, x in mine.items()} for me, mine in record.items()}
    ratings = dict.fromkeys(totals, ELO_START)
    parts = max([ELO_PARTS, *(sum(n for n, _ in mine.values()) for mine in totals.values())])
    for _ in range(parts):
        gains = {
            me: math.fsum(won - n * _expected(ratings[me], ratings[other]) for other, (n, won) in mine.items())
            for me, mine in totals.items()
        }
        ratings = {me: rating + k / parts * gains[me] for me, rating in ratings.items()}
    return ratings


def elo_to_score(rating: float) -> float:
    """(rating - 1000) ln(10) / 400: a Bradley-Terry score, P(a beats b) = sigmoid(score of a - score of b)."""
    return (rating - ELO_START) / ELO_SCALE


def dpo_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation: -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))).

    Rafailov et al. (arXiv:2305.18290), equation 7. Each argument [B]: the log-probability of a whole response, nats,
    of the policy (with gradient) and of the reference. beta: above 0, usually 0.1. Returns [B], nats per pair.
    """
    if not beta > 0:
        raise ConfigError(f"DPO's beta is {beta}: give a number above 0 (usually 0.1)")
    chosen_B = at_least_float32(chosen_B) - at_least_float32(ref_chosen_B)
    return bradley_terry_loss(beta * chosen_B, beta * (at_least_float32(rejected_B) - at_least_float32(ref_rejected_B)))


def ipo_loss(chosen_B: Tensor, rejected_B: Tensor, ref_chosen_B: Tensor, ref_rejected_B: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation: ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 beta))^2.

    Azar et al. (arXiv:2310.12036), equation 17, where beta is tau: the lead of the chosen side is drawn to 1 / (2 beta)
    and not beyond it. Each argument [B]: the *mean* log-probability per token of a response, nats, of the policy (with
    gradient) and of the reference; the authors' own results are with the mean, as is TRL's loss. Returns [B], nats
    squared per pair.
    """
    lead_B = at_least_float32(chosen_B) - at_least_float32(ref_chosen_B)
    lead_B = lead_B - (at_least_float32(rejected_B) - at_least_float32(ref_rejected_B))
    return (lead_B - 1.0 / (2.0 * beta)).square()


def kto_loss(
    logprobs_B: Tensor,
    ref_logprobs_B: Tensor,
    desirable_B: Tensor,
    reference_point: float,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation: w_d (1 - sigmoid(beta (r - z))) for a good response, w_u (1 - sigmoid(beta
    (z - r))) for a bad one, with r = logprob - ref_logprob.

    Ethayarajh et al. (arXiv:2402.01306), section 4.

    Args:
        logprobs_B: [B] log-probability of a whole response, nats, by the policy (with gradient).
        ref_logprobs_B: [B] the same by the reference.
        desirable_B: [B] bool; whether the response was called good.
        reference_point: z, nats: the KL of the policy to the reference, at least 0; see `kto_reference_point`.
        beta: above 0.
        desirable_weight, undesirable_weight: w_d and w_u.

    Returns:
        [B] from 0 to its weight; half the weight where r = z.
    """
    lead_B = beta * (at_least_float32(logprobs_B) - at_least_float32(ref_logprobs_B) - reference_point)
    good_B = desirable_weight * torch.sigmoid(-lead_B)
    return torch.where(desirable_B, good_B, undesirable_weight * torch.sigmoid(lead_B))


def kto_reference_point(log_ratio_sum: float, count: int) -> float:
    """z of `kto_loss`: the mean of logprob - ref_logprob over responses to *other* prompts, nats, and at least 0.

    log_ratio_sum: over `count` such rows of the whole optimizer step. 0 without any.
    """
    return max(0.0, log_ratio_sum / count) if count else 0.0


def orpo_loss(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """Odds ratio of ORPO: -log sigmoid(log odds(chosen) - log odds(rejected)), odds(p) = p / (1 - p).

    Hong et al. (arXiv:2403.07691), equations 4 and 7; ORPO's whole loss is that of supervised training on the chosen
    responses plus lambda (TRL's beta) times this. Each argument [B]: the mean log-probability per token of a response,
    nats, below 0, with gradient. Returns [B], nats per pair.
    """
    return bradley_terry_loss(log_odds(chosen_B), log_odds(rejected_B))


def log_odds(logprobs: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^logprobs < 1; any shape. A p that rounds to 1 counts as the largest float below it."""
    logprobs = at_least_float32(logprobs)
    logprobs = logprobs.clamp(max=-torch.finfo(logprobs.dtype).eps / 2)
    near_1 = logprobs > -math.log(2.0)  # where 1 - p is exact by expm1, elsewhere by log1p
    by_expm1 = torch.log(-torch.expm1(torch.where(near_1, logprobs, -1.0)))
    by_log1p = torch.log1p(-torch.exp(torch.where(near_1, -1.0, logprobs)))
    return logprobs - torch.where(near_1, by_expm1, by_log1p)


def simpo_loss(chosen_B: Tensor, rejected_B: Tensor, beta: float, gamma: float) -> Tensor:
    """Simple preference optimisation: -log sigmoid(beta (chosen - rejected) - gamma).

    Meng et al. (arXiv:2405.14734), equation 6. Each argument [B]: the mean log-probability per token of a response,
    nats, with gradient. gamma: by how much beta x mean has to lead. Returns [B], nats per pair.
    """
    return bradley_terry_loss(beta * at_least_float32(chosen_B), beta * at_least_float32(rejected_B), gamma)


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Predictions whose probability lies in one stretch, and what came of them."""

    low: float
    """Lower end of the stretch, part of it."""
    high: float
    """Upper end, not part of it (but for 1)."""
    count: int
    """Predictions, at least 1."""
    predicted: float
    """Their mean probability."""
    observed: float
    """Share of them that came true."""


def calibration(probabilities: Tensor, outcomes: Tensor, bins: int) -> tuple[CalibrationBin, ...]:
    """Reliability curve: predictions in `bins` stretches of equal width from 0 to 1, less those without any.

    Guo et al., "On Calibration of Modern Neural Networks" (arXiv:1706.04599). probabilities [N] from 0 to 1; outcomes
    [N], 1 where it came true, else 0 (a tie may be 0.5).
    """
    assert probabilities.shape == outcomes.shape and bins >= 1, (probabilities.shape, outcomes.shape, bins)
    probabilities, outcomes = probabilities.detach().double(), outcomes.detach().double()
    assert bool(((probabilities >= 0) & (probabilities <= 1)).all()), "a probability lies outside of 0 to 1"
    bin_N = (probabilities * bins).long().clamp(max=bins - 1)
    return tuple(
        CalibrationBin(
            low=b / bins,
            high=(b + 1) / bins,
            count=int((bin_N == b).sum()),
            predicted=float(probabilities[bin_N == b].mean()),
            observed=float(outcomes[bin_N == b].mean()),
        )
        for b in bin_N.unique().tolist()
    )


def wilson_interval(successes: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """Interval (low, high) of a share that was seen `successes` times in `n`; z 1.96 is 95%. (0, 1) for n = 0.

    E. B. Wilson (1927): unlike share +- z deviations it stays within 0 to 1 and is right for small n.
    """
    assert 0 <= successes <= n, (successes, n)
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z * z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def correlation_interval(r: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Interval (low, high) of Pearson's correlation `r` of `n` pairs of values; z 1.96 is 95%. (-1, 1) for n < 4.

    R. A. Fisher (1921): artanh(r) is nearly normal, with deviation 1 / sqrt(n - 3).
    """
    assert -1.0 <= r <= 1.0, r
    if n <= 3:
        return -1.0, 1.0
    if abs(r) == 1.0:
        return r, r
    middle, half = math.atanh(r), z / math.sqrt(n - 3)
    return math.tanh(middle - half), math.tanh(middle + half)


def _expected(rating_a: float, rating_b: float) -> float:
    """P(a beats b), in a form that cannot overflow."""
    return 0.5 * (1.0 + math.tanh((rating_a - rating_b) / (2.0 * ELO_SCALE)))
