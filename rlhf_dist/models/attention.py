"""Attention over one packed row of several sequences, without padding and without a mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlhf_dist.errors import ModelError
from rlhf_dist.models.sequence_parallel import ALONE, ATTRIBUTE, SequenceGroup, check_exchange

SEGMENTED = "segmented"
VARLEN = "varlen"


def choose_attention(attention: str, device: str, dtype: str = "bfloat16") -> str:
    """The attention to load a model with: `segmented` or `varlen`.

    `attention` is `model.attention`, `device` is `cpu`, `cuda` or `cuda:N`, `dtype` is `model.dtype`. `auto` takes
    varlen where it can run (a GPU, bfloat16), else segmented.

    Raises ModelError when varlen is asked for where it cannot run.
    """
    obstacle = _varlen_obstacle(device, dtype)
    if attention == "auto":
        return SEGMENTED if obstacle else VARLEN
    if attention == VARLEN and obstacle:
        raise ModelError(f"model.attention = {VARLEN}: {obstacle}; set model.attention=segmented or auto")
    return attention


def _varlen_obstacle(device: str, dtype: str) -> str:
    if torch.device(device).type != "cuda":
        return f"it needs a GPU, and the device is {device}"
    if dtype == "float32":
        return "it does not compute in float32 (model.dtype)"
    return ""


def register_attention() -> None:
    """Make both known to transformers. No mask function goes with them, so that no [T, T] mask is ever built."""
    AttentionInterface.register(SEGMENTED, partial(shared, segmented))
    AttentionInterface.register(VARLEN, partial(shared, varlen))


def shared(
    attend: Callable[..., tuple[torch.Tensor, None]],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **how: Any,
) -> tuple[torch.Tensor, None]:
    """One of the two, over the whole row where its tokens are shared out over ranks."""
    sequence: SequenceGroup = getattr(module, ATTRIBUTE, ALONE)
    if sequence.size == 1:
        return attend(module, query, key, value, attention_mask, **how)
    check_exchange(query, value, how.get("cu_seq_lens_q"))
    output, _ = attend(module, *sequence.to_heads(query, key, value), attention_mask, **how)
    return sequence.to_tokens(output), None


def segmented(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each segment of a packed row, by PyTorch's own kernel, segment by segment.

    query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim]; cu_seq_lens_q int [S + 1] holds the
    boundaries (0 first, T last). Some models (StableLM, Falcon) hand on only position_ids int [1, T]: a segment begins
    where they are 0. Without both each row is one whole sequence without padding. Returns [1, T, heads, head_dim]. No
    dropout: the engine that sampled the tokens has none.

    Segment by segment with `split` (whose backward is one `cat`) was the fastest of what was measured on a CPU, ahead
    of padding groups of similar lengths: for 64 segments of 10-265 tokens the kernel's own work is what is left.

    Raises ModelError for attention that this kernel does not do: a sliding window shorter than a segment, capped
    scores, sinks, position biases, a key-value cache.
    """
    lengths = _lengths(query.shape[2], cu_seq_lens_q, position_ids)
    if sliding_window is not None and sliding_window < max(lengths):
        raise ModelError(
            f"model.attention = {SEGMENTED} does not support a sliding window of {sliding_window} tokens, shorter than "
            f"a sequence of {max(lengths)}; set model.attention={VARLEN} on a GPU, or use another model"
        )
    _refuse_unsupported(SEGMENTED, query, key, attention_mask, extras)
    grouped = query.shape[1] != key.shape[1]
    pieces = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped).transpose(1, 2)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, dim=1), None


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    position_ids: torch.Tensor | None = None,
    **extras: Any,
) -> tuple[torch.Tensor, None]:
    """The same as `segmented` for all segments in one call of PyTorch's flash attention kernel, on a GPU.

    max_length_q: the longest segment, where the caller knows it; no value is read back from the GPU then. A sliding
    window of W tokens is one that sees its own and W - 1 before it.
    """
    _refuse_unsupported(VARLEN, query, key, attention_mask, extras)
    if cu_seq_lens_q is None or max_length_q is None:
        lengths = _lengths(query.shape[2], cu_seq_lens_q, position_ids)
        cu_seq_lens_q = torch.tensor([0, *accumulate(lengths)], device=query.device)
        max_length_q = max(lengths)
    boundaries = cu_seq_lens_q.int()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        boundaries,
        boundaries,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, torch.Tensor)
    return out[None], None


def _lengths(tokens: int, cu_seq_lens: torch.Tensor | None, position_ids: torch.Tensor | None) -> list[int]:
    if cu_seq_lens is None and position_ids is None:
        return [tokens]
    if cu_seq_lens is not None:
        boundaries: list[int] = cu_seq_lens.tolist()
    else:
        assert position_ids is not None and position_ids.shape == (1, tokens), "one packed row"
        boundaries = [*(position_ids[0] == 0).nonzero()[:, 0].tolist(), tokens]
        assert boundaries[0] == 0, "a row begins with a sequence"
    return [stop - start for start, stop in pairwise(boundaries)]


def _refuse_unsupported(
    attention: str, query: torch.Tensor, key: torch.Tensor, attention_mask: torch.Tensor | None, extras: dict[str, Any]
) -> None:
    problem = ""
    for name in ("softcap", "s_aux", "position_bias"):
        if extras.get(name) is not None:
            problem = f"the attention feature {name}"
    if problem:
        raise ModelError(
            f"model.attention = {attention} does not support {problem}; use another model, such as Qwen or Llama"
        )
    if key.shape[2] != query.shape[2] or attention_mask is not None or extras.get("is_causal") is False:
        raise ModelError(
            f"attention {attention} takes whole causal sequences only: no key-value cache, no mask. "
            "Load the model with attention sdpa to generate with it"
        )
