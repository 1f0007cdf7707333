"""Policies head to head: who wins how often, with intervals, at equal length, and how they rank.

Outcomes are those of the first policy: 1 a win, 0.5 a tie, 0 a loss. Intervals are of 95%, over prompts: several
responses to one prompt are one observation. Suffixes: `_N` pairs of responses, `_P` prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_dist.algo.preference import elo_ratings, wilson_interval

ROUNDING = 1e-5
"""Scores are float32, and batched in another way they come out a little different: what differs by no more than this
share of the larger one (or of 1) is the same."""
Z = 1.96
RESAMPLES = 400
"""Of the prompts, for the intervals of ratings."""
RIDGE = 0.01
"""Weight of the squared coefficients in the fit of `length_controlled`: enough to keep them finite."""
NEWTON_STEPS = 100
CONVERGED = 1e-9


@dataclass(frozen=True, slots=True)
class Contest:
    """What came of two policies that answered the same prompts."""

    prompts: int
    wins: int
    """Pairs of responses that the first policy won."""
    ties: int
    losses: int
    win_rate: float
    """Of the first policy: (wins + ties / 2) / pairs, mean over prompts."""
    low: float
    """Its interval."""
    high: float
    length_controlled: float | None
    """The win rate at equal length; None where length and policy cannot be told apart."""
    length_low: float | None
    """Its interval."""
    length_high: float | None
    longer: float
    """How much longer the first policy's responses are, mean over pairs."""


@dataclass(frozen=True, slots=True)
class Rating:
    """Elo of one policy among several."""

    elo: float
    """The mean of all is 1000; 400 points are odds of ten to one."""
    low: float
    high: float


def outcomes(first_N: Tensor, second_N: Tensor, margin: float) -> Tensor:
    """[N] outcome of each pair of scores; one that differs by no more than `margin`, 0 or more, is a tie."""
    first_N, second_N = first_N.double(), second_N.double()
    largest_N = torch.maximum(first_N.abs(), second_N.abs()).clamp(min=1.0)
    apart_N = first_N - second_N
    decided_N = apart_N.abs() > margin + ROUNDING * largest_N
    return 0.5 + 0.5 * apart_N.sign() * decided_N


def rate_interval(outcome_P: Tensor, z: float = Z) -> tuple[float, float]:
    """Interval (low, high) of the mean of outcomes from 0 to 1: Wilson's, of as many wins or losses as they are worth.

    Ties, and means over several responses, vary less than wins and losses with the same mean p: n of them say as much
    as n p (1 - p) / variance. Both are taken with z^2 / 2 wins and as many losses added (as Agresti and Coull, 1998,
    do), so that outcomes that are all the same are not taken for certain. Without ties it is Wilson's interval.
    """
    n = len(outcome_P)
    assert n > 0, "there is no mean of nothing"
    total, total_of_squares = float(outcome_P.double().sum()), float(outcome_P.double().square().sum())
    added, size = z * z / 2, n + z * z
    mean = (total + added) / size
    variance = (total_of_squares + added) / size - mean * mean
    worth = n * mean * (1 - mean) / variance
    return wilson_interval(min(total / n, 1.0) * worth, worth, z)


@dataclass(frozen=True, slots=True)
class AtEqualLength:
    """The win rate of two policies whose responses have the same length."""

    rate: float
    low: float
    """Its interval."""
    high: float


def length_controlled(outcome_N: Tensor, longer_N: Tensor, prompt_N: Tensor) -> AtEqualLength | None:
    """The win rate that a logistic regression expects at equal length:

        P(win) = sigmoid(theta + phi tanh(longer / std(longer))), theta and phi of the greatest likelihood;
        the rate is sigmoid(theta)

    AlpacaEval 2 (Dubois et al., arXiv:2404.04475), without its term for the difficulty of a prompt, which it fits over
    the models of its leaderboard. Ties count as half a win. `RIDGE` keeps both finite where one side always wins. The
    interval is Wilson's, of as many wins or losses as the regression is worth: from the variance of theta that is
    robust against what pairs of a prompt have in common (the sandwich by prompts), with wins and losses at equal length
    added as in `rate_interval`. Without an effect of length it is that interval.

    Args:
        outcome_N: [N] outcomes, at least one.
        longer_N: [N] length of the first response less that of the second, any unit.
        prompt_N: [N] from 0, the same for pairs of one prompt; prompts count alike, however many pairs they have.

    Returns:
        None where all pairs have the same difference in length and it is not 0: whose merit is it then?
    """
    feature_N = length_feature(longer_N)
    if feature_N is None:
        return None
    x_N2, y_N = torch.stack([torch.ones_like(feature_N), feature_N], 1), outcome_N.double()
    weight_N = prompt_N.bincount().double().reciprocal()[prompt_N]
    rate = float(torch.sigmoid(logistic_fit(x_N2, y_N, weight_N)[0]))
    added = Z * Z / 2
    at_0 = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    more_x, more_y = torch.cat([x_N2, at_0]), torch.cat([y_N, torch.tensor([1.0, 0.0], dtype=torch.float64)])
    more_weight = torch.cat([weight_N, torch.tensor([added] * 2, dtype=torch.float64)])
    beta_2 = logistic_fit(more_x, more_y, more_weight)
    p_M = torch.sigmoid(more_x @ beta_2)
    slope_M2 = more_x * (more_weight * (p_M - more_y))[:, None]
    slope_P2 = torch.zeros(int(prompt_N.max()) + 1, 2, dtype=torch.float64).index_add_(0, prompt_N, slope_M2[:-2])
    # Those that were added are many of weight 1, not one of weight `added`.
    spread_22 = slope_P2.T @ slope_P2 + slope_M2[-2:].T @ slope_M2[-2:] / added
    inverse_22 = torch.linalg.inv(curvature(more_x, p_M, more_weight))
    variance = float((inverse_22 @ spread_22 @ inverse_22)[0, 0])
    p_0 = float(torch.sigmoid(beta_2[0]))
    worth = max(0.0, 1 / (variance * p_0 * (1 - p_0)) - Z * Z)
    return AtEqualLength(rate, *wilson_interval(rate * worth, worth, Z))


def length_feature(longer_N: Tensor) -> Tensor | None:
    """[N] tanh(longer / std(longer)), the sample's deviation; None for the same difference throughout, but for 0."""
    longer_N = longer_N.double()
    if bool((longer_N == longer_N[0]).all()):
        return torch.zeros_like(longer_N) if float(longer_N[0]) == 0 else None
    return torch.tanh(longer_N / longer_N.std())


def logistic_fit(x_N2: Tensor, y_N: Tensor, weight_N: Tensor) -> Tensor:
    """[2] coefficients of P(y) = sigmoid(x beta) of the greatest weighted likelihood, less `RIDGE` / 2 beta^2.

    Newton's method, with steps halved until the likelihood rises. All arguments are float64.
    """

    def loss(beta_2: Tensor) -> float:
        eta_N = x_N2 @ beta_2
        return float(weight_N @ (softplus(eta_N) - y_N * eta_N) + 0.5 * RIDGE * beta_2.square().sum())

    beta_2 = torch.zeros(2, dtype=torch.float64)
    now = loss(beta_2)
    for _ in range(NEWTON_STEPS):
        p_N = torch.sigmoid(x_N2 @ beta_2)
        slope_2 = x_N2.T @ (weight_N * (p_N - y_N)) + RIDGE * beta_2
        step_2 = torch.linalg.solve(curvature(x_N2, p_N, weight_N), slope_2)
        while (then := loss(beta_2 - step_2)) > now and float(step_2.abs().max()) > CONVERGED:
            step_2 = step_2 / 2
        if float(step_2.abs().max()) <= CONVERGED:
            break
        beta_2, now = beta_2 - step_2, then
    return beta_2


def curvature(x_N2: Tensor, p_N: Tensor, weight_N: Tensor) -> Tensor:
    """[2, 2] second derivative of what `logistic_fit` minimises."""
    return (x_N2 * (weight_N * p_N * (1 - p_N))[:, None]).T @ x_N2 + RIDGE * torch.eye(2, dtype=torch.float64)


def contest(outcome_N: Tensor, longer_N: Tensor, prompt_N: Tensor) -> Contest:
    """Two policies' pairs of responses -> who wins how often.

    Args:
        outcome_N: [N] outcomes, at least one.
        longer_N: [N] length of the first response less that of the second.
        prompt_N: [N] integers, the same for pairs of one prompt; prompts count alike, however many pairs they have.
    """
    _, prompt_N, pairs_P = torch.unique(prompt_N, return_inverse=True, return_counts=True)
    outcome_N = outcome_N.double()
    outcome_P = torch.zeros(len(pairs_P), dtype=torch.float64).index_add_(0, prompt_N, outcome_N) / pairs_P
    low, high = rate_interval(outcome_P)
    controlled = length_controlled(outcome_N, longer_N, prompt_N)
    return Contest(
        prompts=len(pairs_P),
        wins=int((outcome_N == 1.0).sum()),
        ties=int((outcome_N == 0.5).sum()),
        losses=int((outcome_N == 0.0).sum()),
        win_rate=float(outcome_P.mean()),
        low=low,
        high=high,
        length_controlled=None if controlled is None else controlled.rate,
        length_low=None if controlled is None else controlled.low,
        length_high=None if controlled is None else controlled.high,
        longer=float(longer_N.double().mean()),
    )


def ratings(battles: Sequence[tuple[int, str, str, float]], seed: int) -> dict[str, Rating]:
    """Elo of each policy from (prompt, first, second, outcome), see `elo_ratings`; intervals by resampling prompts.

    A policy that has won (or lost) every battle has the same rating in every resample: its interval has no width.
    """
    by_prompt: dict[int, list[tuple[str, str, float]]] = {}
    for prompt, first, second, outcome in battles:
        by_prompt.setdefault(prompt, []).append((first, second, outcome))
    rounds = list(by_prompt.values())

    def again(times_P: Tensor) -> Mapping[str, float]:
        drawn = [battle for one, times in zip(rounds, times_P.tolist(), strict=True) for battle in one * int(times)]
        return elo_ratings(drawn)

    whole = elo_ratings([battle for one in rounds for battle in one])
    found = [again(times_P) for times_P in resamples(len(rounds), seed)]
    ends = {name: percentiles([one[name] for one in found if name in one]) for name in whole}
    return {name: Rating(elo, *ends[name]) for name, elo in whole.items()}


def resamples(prompts: int, seed: int) -> list[Tensor]:
    """`RESAMPLES` times [P]: how often each prompt is drawn, with replacement, as often as there are prompts."""
    chance = torch.Generator().manual_seed(seed)
    draw: Callable[[], Tensor] = partial(torch.randint, prompts, (prompts,), generator=chance)
    return [torch.bincount(draw(), minlength=prompts).double() for _ in range(RESAMPLES)]


def percentiles(values: Sequence[float]) -> tuple[float, float]:
    """The 2.5th and 97.5th."""
    low, high = torch.quantile(torch.tensor(values, dtype=torch.float64), torch.tensor([0.025, 0.975]).double())
    return float(low), float(high)
