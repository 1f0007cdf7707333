"""Token weights: how the losses of the tokens of an optimizer step become one number.

Each function takes the response lengths of the *whole* optimizer step, over all ranks and micro-batches, and gives the
weight of one token of each row. The step's loss is the sum over rows and their response tokens of weight x per-token
loss, so however the rows are cut into ranks and micro-batches, the gradient is the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_dist.errors import ConfigError


def token_mean(response_lengths_B: Tensor, max_tokens: int) -> Tensor:
    """Every token of the optimizer step weighs the same: w_b = 1 / sum_b length_b.

    DAPO's token-level loss (arXiv:2503.14476). A long response is not diluted by its own length. The weights sum to 1
    over all tokens.

    Args:
        response_lengths_B: [B] integers, response tokens of each row of the optimizer step; 0 is allowed.
        max_tokens: longest response allowed; belongs to the signature of token weights and has no part in this one.

    Returns:
        [B] float64, per token; all 0 where there are no tokens.
    """
    assert response_lengths_B.ndim == 1, response_lengths_B.shape
    total = int(response_lengths_B.sum())
    return response_lengths_B.new_full(response_lengths_B.shape, 1.0 / total if total else 0.0, dtype=torch.float64)


def sequence_mean(response_lengths_B: Tensor, max_tokens: int) -> Tensor:
    """Every response weighs the same, and its tokens share that: w_b = 1 / (B length_b).

    The mean over responses of the mean over each one's tokens: GRPO as in its paper (DeepSeekMath, arXiv:2402.03300)
    and GSPO (arXiv:2507.18071). A token of a long response weighs less than one of a short response.

    A row without response tokens counts in B and weighs 0, as if the mean of its losses were 0: what one response
    weighs does not depend on how many others are empty. The weights sum to 1 over all tokens where no row is empty, and
    to the share of rows with tokens otherwise.

    Args:
        response_lengths_B: [B] integers, response tokens of each row of the optimizer step; 0 is allowed.
        max_tokens: longest response allowed; belongs to the signature of token weights and has no part in this one.

    Returns:
        [B] float64, per token.
    """
    assert response_lengths_B.ndim == 1, response_lengths_B.shape
    lengths_B = response_lengths_B.double()
    return torch.where(lengths_B > 0, 1.0 / (len(lengths_B) * lengths_B.clamp(min=1)), 0.0)


def sequence_sum(response_lengths_B: Tensor, max_tokens: int) -> Tensor:
    """Sum over a response's tokens by a constant, mean over responses: w_b = 1 / (B max_tokens).

    Dr. GRPO as in its paper (arXiv:2503.20783): the weight of a token depends neither on its own response's length nor
    on that of others, from step to step too. The weights sum to the mean length over `max_tokens`, so where responses
    are much shorter than allowed, gradients are that much smaller than with `token_mean`.

    Args:
        response_lengths_B: [B] integers, response tokens of each row of the optimizer step; 0 is allowed and counts
            in B.
        max_tokens: longest response allowed, above 0.

    Returns:
        [B] float64, per token, the same in every row.
    """
    assert response_lengths_B.ndim == 1, response_lengths_B.shape
    if max_tokens <= 0:
        raise ConfigError(f"the longest response allowed is {max_tokens} tokens: give a number above 0")
    weight = 1.0 / (max(len(response_lengths_B), 1) * max_tokens)
    return response_lengths_B.new_full(response_lengths_B.shape, weight, dtype=torch.float64)
