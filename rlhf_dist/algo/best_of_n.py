"""Best of n: the policy that samples n responses and keeps the one with the highest reward."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BestOfN:
    """What the proxy's favourite among n samples is worth."""

    n: int
    """Samples that it is chosen from."""
    kl: float
    """log n - (n - 1) / n: KL of that policy to the one sampled from, nats per response, at most."""
    proxy: float
    """Expected proxy reward, mean over prompts."""
    proxy_error: float
    """Its standard error over prompts; 0 for a single one."""
    gold: float
    """Expected gold reward, mean over prompts."""
    gold_error: float


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n nats: KL(best of n || the policy sampled from) where no two responses have the same reward.

    Exact for a continuous reward; for finitely many responses an upper bound (Beirami et al., arXiv:2401.01879), which
    is close while no response is likely to be drawn twice. n: samples, at least 1.
    """
    assert n >= 1, n
    return math.log(n) - (n - 1) / n


def best_of_n_distribution(probs_V: Tensor, rewards_V: Tensor, n: int) -> Tensor:
    """What best of n draws from a categorical distribution: q_v = F(v)^n - F(below v)^n.

    F(v) is the probability of a reward of at most that of v.

    Args:
        probs_V: [V] probabilities, sum 1.
        rewards_V: [V] no two the same.
        n: samples, at least 1.

    Returns:
        [V] probabilities, float64.
    """
    assert n >= 1 and len(rewards_V.unique()) == len(rewards_V), "rewards must be distinct"
    order_V = rewards_V.argsort()
    up_to_V = probs_V.double()[order_V].cumsum(0)
    up_to_V = up_to_V / up_to_V[-1]
    best_V = torch.cat([up_to_V[:1] ** n, (up_to_V**n).diff()])
    return torch.zeros_like(best_V).index_copy_(0, order_V, best_V)


def categorical_kl(probs_V: Tensor, base_V: Tensor) -> float:
    """KL(probs || base) = sum_v p_v log(p_v / b_v), nats, exact; infinite where base is 0 and probs is not."""
    probs_V, base_V = probs_V.double(), base_V.double()
    drawn_V = probs_V > 0
    return float((probs_V[drawn_V] * (probs_V[drawn_V].log() - base_V[drawn_V].log())).sum())


def best_of_n_estimate(proxy_N: Tensor, gold_N: Tensor, n: int) -> float:
    """Expected gold reward of the response that the proxy likes best among n, unbiased, from N samples of one prompt.

        mean over all C(N, n) subsets = sum_i C(i - 1, n - 1) / C(N, n) gold_i,  i = 1..N from the lowest proxy up

    WebGPT (arXiv:2112.09332); used for over-optimisation by Gao et al. (arXiv:2210.10760). Samples with
    equal proxies are equally likely to be taken: each counts with their mean gold.

    Args:
        proxy_N: [N] rewards that choose.
        gold_N: [N] rewards that count.
        n: samples chosen from, 1 to N.

    Returns:
        The estimate, in the unit of gold.
    """
    total = len(proxy_N)
    assert proxy_N.shape == gold_N.shape and 1 <= n <= total, (proxy_N.shape, gold_N.shape, n)
    _, tie_N, ties_G = torch.unique(proxy_N, return_inverse=True, return_counts=True)
    gold_G = torch.zeros(len(ties_G), dtype=torch.float64).index_add_(0, tie_N.cpu(), gold_N.detach().double().cpu())
    gold_G = gold_G / ties_G.cpu()
    # The highest of a subset lies in a group when the subset lies up to its end, and not up to its beginning.
    last_G = ties_G.cpu().cumsum(0).tolist()
    within_G = [0.0, *(math.comb(last, n) / math.comb(total, n) for last in last_G)]
    return math.fsum(g * (b - a) for g, a, b in zip(gold_G.tolist(), within_G, within_G[1:], strict=False))


def best_of_n_curve(proxies: Sequence[Tensor], golds: Sequence[Tensor]) -> list[BestOfN]:
    """For n = 1, 2, 4, ... and the most samples that every prompt has; see `best_of_n_estimate`.

    Args:
        proxies: [N] of each prompt, rewards that choose; N may differ.
        golds: [N] of each prompt, rewards that count.
    """
    found = []
    for n in sizes(min(map(len, proxies))):
        proxy = _mean([best_of_n_estimate(one, one, n) for one in proxies])
        gold = _mean([best_of_n_estimate(one, other, n) for one, other in zip(proxies, golds, strict=True)])
        found.append(BestOfN(n, best_of_n_kl(n), *proxy, *gold))
    return found


def sizes(last: int) -> Iterator[int]:
    """1, 2, 4, ... below `last`, and `last`."""
    n = 1
    while n < last:
        yield n
        n *= 2
    yield last


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """And its standard error."""
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(spread / len(values))
