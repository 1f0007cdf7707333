"""What an evaluation's samples say of best of n: the response that the total reward likes best among n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from rlhf_dist.algo.best_of_n import best_of_n_curve
from rlhf_dist.types import Experience

Z = 1.96


def best_of_n_lines(experiences: Sequence[Experience], gold: str) -> Iterator[str]:
    """A table for n = 1, 2, 4, ... up to the samples of a prompt; nothing where a prompt has but one.

    `gold`: name of the reward that is the truth, empty without one. Prompts without a sample are not among them.
    """
    proxies = [torch.from_numpy(one.scores.total).double() for one in experiences]
    golds = [
        torch.from_numpy(one.scores.components[gold] if gold else one.scores.total).double() for one in experiences
    ]
    curve = best_of_n_curve(proxies, golds)
    if curve[-1].n == 1:
        return
    yield ""
    yield f"best of n by the total reward, {len(experiences)} prompts, 95% intervals; KL to the policy itself in nats"
    yield f"{'n':>6}{'KL at most':>12}{'reward':>18}" + (f"{gold:>18}" if gold else "")
    for row in curve:
        figures = [(row.proxy, row.proxy_error)] + ([(row.gold, row.gold_error)] if gold else [])
        shown = "".join(f"{f'{mean:z.3f} +- {Z * error:.3f}':>18}" for mean, error in figures)
        yield f"{row.n:6}{row.kl:12.3f}{shown}"
