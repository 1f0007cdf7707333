"""Log-probabilities and entropies of tokens, without ever holding the logits of a long batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf_dist.algo.action_mask import ActionMask
from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target token and the entropy of the distribution it is drawn from, both in nats.

        logprob = log softmax(z / T)[target]        entropy = -sum_v p_v log p_v,  p = softmax(z / T)

    Args:
        logits: [..., V] any float dtype; the maths is float32 (float64 for float64 input). -inf: cannot be drawn.
        targets: [...] integer token ids below V.
        temperature: of the sampler, so that the result compares with the rollout's logprobs; above 0.
        entropy_gradient: for an entropy bonus. Costs no memory that is held for backward.

    Returns:
        (logprobs [...], entropy [...]). Without `entropy_gradient` the entropy is a statistic: it carries no gradient.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}: log-probabilities need one above 0; 1.0 is the plain softmax")
    scaled = at_least_float32(logits)
    if temperature != 1.0:
        scaled = scaled / temperature
    log_softmax = torch.log_softmax(scaled, dim=-1)
    logprobs = log_softmax.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
    if entropy_gradient:
        return logprobs, _Entropy.apply(log_softmax)  # pyright: ignore[reportReturnType]
    # Last, because the recomputation in a checkpoint's backward stops before it: nothing here is saved for a gradient.
    with torch.no_grad():
        return logprobs, _entropy(log_softmax)


def _entropy(log_softmax: Tensor) -> Tensor:
    return -log_softmax.exp().mul_(_finite(log_softmax)).sum(dim=-1)


def _finite(log_softmax: Tensor) -> Tensor:
    # -inf is made finite because its share, 0 x -inf, is 0 and not NaN.
    return log_softmax.clamp(min=torch.finfo(log_softmax.dtype).min)


class _Entropy(torch.autograd.Function):
    """`_entropy` with the gradient dH / d log p_v = -p_v (log p_v + 1).

    All it saves is its input, which the softmax's own backward holds anyway; autograd would save two more as large.
    """

    @staticmethod
    def forward(ctx: Any, log_softmax: Tensor) -> Tensor:
        ctx.save_for_backward(log_softmax)
        return _entropy(log_softmax)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (log_softmax,) = ctx.saved_tensors
        slope = log_softmax.exp().mul_(_finite(log_softmax).add_(1.0))
        return slope.mul_(-grad_outputs[0].unsqueeze(-1))


def chunked_logprobs(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    targets_N: Tensor,
    temperature: float,
    chunk: int,
    entropy_gradient: bool = False,
    mask: ActionMask | None = None,
    least_chunks: int = 1,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of `head(hidden_ND)`, with the logits of at most `chunk` tokens held at once.

    Also in backward: each chunk is a checkpoint whose logits are made again there (not if there is only one chunk).

    Args:
        hidden_ND: [N, D] last hidden states; N may be 0.
        head: [n, D] -> logits [n, V], for n <= chunk; free of randomness, because backward calls it a second time.
        targets_N: [N] integer token ids.
        temperature: see `token_logprobs`.
        chunk: tokens, at least 1.
        entropy_gradient: see `token_logprobs`.
        mask: of the same N positions; what it leaves out cannot be drawn. None: everything can.
        least_chunks: cut into so many at least, empty ones too. Under ZeRO-3 a call of the head gathers its weights
            from all ranks, so all have to call it equally often: give them all the largest of their `chunk_count`.

    Returns:
        (logprobs [N] with gradient to the hidden states and the head, entropy [N] with or without), nats.
    """
    count = max(chunk_count(len(hidden_ND), chunk), least_chunks)

    def of_chunk(hidden: Tensor, targets: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        if mask is not None:
            logits = logits.masked_fill(mask.outside(beside, targets, temperature), -torch.inf)
        return token_logprobs(logits, targets, temperature, entropy_gradient)

    recompute = torch.is_grad_enabled() and count > 1
    parts: list[tuple[Tensor, Tensor]] = []
    beside_ND = hidden_ND if mask is None else mask.hidden
    parted = (tensor.tensor_split(count) for tensor in (hidden_ND, targets_N, beside_ND))
    for inputs in zip(*parted, strict=True):
        if recompute:
            part = checkpoint(of_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(part, tuple)
            parts.append(part)
        else:
            parts.append(of_chunk(*inputs))
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat([entropy for _, entropy in parts])


def chunk_count(tokens: int, chunk: int) -> int:
    """Into how many chunks of at most `chunk` so many tokens are cut; 1 for none."""
    if chunk < 1:
        raise ConfigError(f"the logprob chunk is {chunk} tokens: give 1 or more")
    return max(1, -(-tokens // chunk))
