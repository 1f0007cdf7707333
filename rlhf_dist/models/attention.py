"""Attention over one packed row of several sequences, without padding and without a mask."""

from __future__ import annotations

import importlib.util
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from rlhf_dist.errors import ModelError

SEGMENTED = "segmented"
FLASH = "flash_attention_2"


def choose_attention(attention: str, device: str, dtype: str = "bfloat16") -> str:
    """The attention to load a model with: `segmented` or `flash_attention_2`.

    `attention` is `model.attention`, `device` is `cpu` or `cuda`, `dtype` is `model.dtype`. `auto` takes
    flash_attention_2 where it can run (a GPU, the flash_attn package, bfloat16), else segmented.

    Raises ModelError when flash_attention_2 is asked for where it cannot run.
    """
    obstacle = _flash_obstacle(device, dtype)
    if attention == "auto":
        return SEGMENTED if obstacle else FLASH
    if attention == FLASH and obstacle:
        raise ModelError(f"model.attention = {FLASH}: {obstacle}; set model.attention=segmented or auto")
    return attention


def _flash_obstacle(device: str, dtype: str) -> str:
    if device != "cuda":
        return f"it needs a GPU, and the device is {device}"
    if dtype == "float32":
        return "it does not compute in float32 (model.dtype)"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    return ""


def register_segmented() -> None:
    """Make `segmented` known to transformers. No mask function goes with it, so that no [T, T] mask is ever built."""
    AttentionInterface.register(SEGMENTED, segmented)


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
    _refuse_unsupported(query, key, attention_mask, sliding_window, max(lengths), extras)
    grouped = query.shape[1] != key.shape[1]
    pieces = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped).transpose(1, 2)
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(pieces, dim=1), None


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
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sliding_window: int | None,
    longest: int,
    extras: dict[str, Any],
) -> None:
    problem = ""
    if sliding_window is not None and sliding_window < longest:
        problem = f"a sliding window of {sliding_window} tokens, shorter than a sequence of {longest}"
    for name in ("softcap", "s_aux", "position_bias"):
        if extras.get(name) is not None:
            problem = f"the attention feature {name}"
    if problem:
        raise ModelError(
            f"model.attention = {SEGMENTED} does not support {problem}; set model.attention={FLASH} "
            "on a GPU, or use another model"
        )
    if key.shape[2] != query.shape[2] or attention_mask is not None or extras.get("is_causal") is False:
        raise ModelError(
            f"attention {SEGMENTED} takes whole causal sequences only: no key-value cache, no mask. "
            "Load the model with attention sdpa to generate with it"
        )
