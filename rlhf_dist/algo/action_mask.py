"""NLPO's masked action space (arXiv:2210.01241): only what an earlier policy found likely may be drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_dist.algo.masking import at_least_float32


def likeliest(logits: Tensor, top_p: float, temperature: float = 1.0) -> Tensor:
    """The smallest set of the likeliest tokens whose probabilities add up to `top_p` or more.

    Args:
        logits: [..., V] any float dtype; the maths is float32 (float64 for float64 input).
        top_p: above 0, at most 1.
        temperature: of the sampler, above 0; the probabilities are softmax(logits / temperature).

    Returns:
        bool [..., V]; the likeliest token is always in it.
    """
    ordered, tokens = torch.softmax(at_least_float32(logits) / temperature, dim=-1).sort(
        dim=-1, descending=True, stable=True
    )
    # A token is in when those before it do not add up yet. The first is in whatever rounding does to 0 < top_p.
    inside = ordered.cumsum(dim=-1) - ordered < top_p
    inside[..., 0] = True
    return torch.zeros_like(inside).scatter_(-1, tokens, inside)


@dataclass(frozen=True, slots=True)
class ActionMask:
    """What the earlier policy says of N positions, from which the masks of a chunk are made when they are needed."""

    hidden: Tensor
    """[N, D]; its last hidden states, without gradient."""
    head: Callable[[Tensor], Tensor]
    """[n, D] -> its logits [n, V]."""
    top_p: float

    @torch.no_grad()
    def outside(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """bool [n, V]: True where a token may not be drawn. hidden [n, D], a part of `hidden`; targets int64 [n].

        A token that was drawn is never outside: the sampler's arithmetic may put the edge of the set a token further.
        """
        allowed = likeliest(self.head(hidden), self.top_p, temperature)
        return ~allowed.scatter_(-1, targets.long().unsqueeze(-1), True)
