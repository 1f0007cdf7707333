"""Log-probabilities and entropies of tokens, without ever holding the logits of a long batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf_dist.algo.action_mask import ActionMask
from rlhf_dist.algo.masking import at_least_float32
from rlhf_dist.errors import ConfigError

Entropy = Literal["none", "value", "gradient"]
"""What is wanted of it. none: it is not computed. value: a statistic without a gradient. gradient: for a bonus."""
BLOCK_ELEMENTS = 2**21
"""Logits that are worked on at once: their softmax stays in a processor's cache."""


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float = 1.0, entropy: Entropy = "value"
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token and the entropy of the distribution it is drawn from, both in nats.

        logprob = log softmax(z / T)[target]        entropy = -sum_v p_v log p_v,  p = softmax(z / T)

    For backward the logits alone are held, which their maker holds anyway.

    Args:
        logits: [..., V] any float dtype; the maths is float32 (float64 for float64 input). -inf: cannot be drawn.
        targets: [...] integer token ids below V.
        temperature: of the sampler, so that the result compares with the rollout's logprobs; above 0.
        entropy: whether it is computed, and whether it carries a gradient.

    Returns:
        (logprobs [...], entropy [...] or None).
    """
    return _of_logits(logits, targets, temperature, entropy, overwrite=False)


def _of_logits(
    logits: Tensor, targets: Tensor, temperature: float, entropy: Entropy, overwrite: bool
) -> tuple[Tensor, Tensor | None]:
    """`overwrite`: the gradient takes the place of the logits, which nobody may need by then."""
    if not temperature > 0:
        raise ConfigError(f"temperature is {temperature}: log-probabilities need one above 0; 1.0 is the plain softmax")
    assert entropy in get_args(Entropy), entropy
    rows, ids = logits.reshape(-1, logits.shape[-1]), targets.long().reshape(-1)
    if not (torch.is_grad_enabled() and logits.requires_grad):
        logprobs, entropies = _values(rows, ids, temperature, entropy != "none")
    else:
        # The gradient's way goes beside the values. The recomputation in a checkpoint's backward ends with the last
        # tensor that is saved, so that it makes the logits again and no softmax.
        way = _Way.apply(rows, ids, temperature, entropy == "gradient", overwrite)
        assert isinstance(way, Tensor)
        logprobs, entropies = _values(rows, ids, temperature, entropy != "none")
        logprobs = logprobs + way[:, 0]
        if entropies is not None and entropy == "gradient":
            entropies = entropies + way[:, 1]
    return logprobs.view(targets.shape), None if entropies is None else entropies.view(targets.shape)


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Cuts [N, V] into blocks of about `BLOCK_ELEMENTS`."""
    step = max(1, BLOCK_ELEMENTS // max(1, rows.shape[1]))
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def _log_softmax(rows: Tensor, temperature: float) -> Tensor:
    scaled = at_least_float32(rows)
    return torch.log_softmax(scaled if temperature == 1.0 else scaled / temperature, dim=-1)


@torch.no_grad()
def _values(rows: Tensor, ids: Tensor, temperature: float, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(logprobs [N], entropy [N] or None) of logits [N, V]."""
    logprobs = at_least_float32(rows.new_empty(rows.shape[0]))
    entropies = torch.empty_like(logprobs) if with_entropy else None
    for block in _blocks(rows):
        log_softmax = _log_softmax(rows[block], temperature)
        logprobs[block] = log_softmax.gather(-1, ids[block, None])[:, 0]
        if entropies is not None:
            softmax = log_softmax.exp()
            entropies[block] = -_finite(log_softmax).mul_(softmax).sum(dim=-1)
    return logprobs, entropies


def _finite(log_softmax: Tensor) -> Tensor:
    """In place. -inf is made finite because its share, 0 x -inf, is 0 and not NaN."""
    return log_softmax.clamp_(min=torch.finfo(log_softmax.dtype).min)


class _Way(torch.autograd.Function):
    """Logits [N, V] -> zeros [N, 2], whose gradients are those of the logprobs g and of the entropies h.

    d logprob / d z_v = (1[v is the target] - p_v) / T      d H / d z_v = -p_v (log p_v + H) / T
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, temperature: float, with_entropy: bool, overwrite: bool) -> Tensor:
        ctx.save_for_backward(rows, ids)
        ctx.temperature, ctx.with_entropy, ctx.overwrite = temperature, with_entropy, overwrite
        return at_least_float32(rows.new_empty(0)).new_zeros(rows.shape[0], 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, ids = ctx.saved_tensors
        g, h = (grad_outputs[0] / ctx.temperature).unbind(1)
        slope = rows.detach() if ctx.overwrite else torch.empty_like(rows)
        for block in _blocks(rows):
            log_softmax = _log_softmax(rows[block], ctx.temperature)
            softmax = log_softmax.exp()
            found = softmax * -g[block, None]
            if ctx.with_entropy:
                weighted = _finite(log_softmax).mul_(softmax)  # p log p
                own = weighted.sub_(weighted.sum(-1, keepdim=True) * softmax)  # p (log p + H), as H = -sum p log p
                found.sub_(own.mul_(h[block, None]))
            slope[block] = found.scatter_add_(-1, ids[block, None], g[block, None])
        return slope, None, None, None, None


def chunked_logprobs(
    hidden_ND: Tensor,
    head: Callable[[Tensor], Tensor],
    targets_N: Tensor,
    temperature: float,
    chunk: int,
    entropy: Entropy = "value",
    mask: ActionMask | None = None,
    least_chunks: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` of `head(hidden_ND)`, with the logits of at most `chunk` tokens held at once.

    Also in backward: each chunk is a checkpoint whose logits are made again there (not if there is only one chunk), and
    their gradient overwrites them.

    Args:
        hidden_ND: [N, D] last hidden states; N may be 0.
        head: [n, D] -> logits [n, V], for n <= chunk; free of randomness, because backward calls it a second time, and
            without use for its logits in its own backward, as a linear layer, a factor or a cap before one.
        targets_N: [N] integer token ids.
        temperature: see `token_logprobs`.
        chunk: tokens, at least 1.
        entropy: see `token_logprobs`.
        mask: of the same N positions; what it leaves out cannot be drawn. None: everything can.
        least_chunks: cut into so many at least, empty ones too. Under ZeRO-3 a call of the head gathers its weights
            from all ranks, so all have to call it equally often: give them all the largest of their `chunk_count`.

    Returns:
        (logprobs [N] with gradient to the hidden states and the head, entropy [N] or None), nats.
    """
    count = max(chunk_count(len(hidden_ND), chunk), least_chunks)
    recompute = torch.is_grad_enabled() and count > 1

    def of_chunk(hidden: Tensor, targets: Tensor, beside: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(hidden)
        assert not recompute or "_saved_result" not in dir(logits.grad_fn), "the head's own backward needs its logits"
        if mask is not None:
            logits = logits.masked_fill(mask.outside(beside, targets, temperature), -torch.inf)
        return _of_logits(logits, targets, temperature, entropy, overwrite=recompute)

    parts: list[tuple[Tensor, Tensor | None]] = []
    beside_ND = hidden_ND if mask is None else mask.hidden
    parted = (tensor.tensor_split(count) for tensor in (hidden_ND, targets_N, beside_ND))
    for inputs in zip(*parted, strict=True):
        if recompute:
            part = checkpoint(of_chunk, *inputs, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(part, tuple)
            parts.append(part)
        else:
            parts.append(of_chunk(*inputs))
    entropies = [found for _, found in parts if found is not None]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat(entropies) if entropies else None


def chunk_count(tokens: int, chunk: int) -> int:
    """Into how many chunks of at most `chunk` so many tokens are cut; 1 for none."""
    if chunk < 1:
        raise ConfigError(f"the logprob chunk is {chunk} tokens: give 1 or more")
    return max(1, -(-tokens // chunk))
