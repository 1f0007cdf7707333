"""What a kind of model can do: how many positions it has, and whether its attention takes packed rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from rlhf_dist.config.checks import CPU_HEAD_DIMS
from rlhf_dist.errors import ModelError
from rlhf_dist.models.attention import SEGMENTED
from rlhf_dist.models.falcon import FALCON
from rlhf_dist.models.head_parts import require_head_parts

PACKABLE_LAYERS = ("full_attention", "sliding_attention", "attention")
UNTOLD = (FALCON, "stablelm")
"""Kinds whose attention is given positions only, which begin anew within each rank's part of a shared row."""
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""What kinds of models call their number of positions."""
ROLLOUT_TOKENS = "rollout.max_prompt_tokens + rollout.max_response_tokens"


def positions(config: Any) -> tuple[int, str] | None:
    """How many positions a model has, and the key that says so; None: it has no limit, or names none."""
    text = config.get_text_config()
    if getattr(text, "alibi", None):
        return None
    for name in POSITIONS:
        count = getattr(text, name, None)
        if isinstance(count, int):
            return count, text.attribute_map.get(name, name)
    return None


def check_positions(path: str | Path, config: Any, tokens: int, keys: str) -> None:
    """Refuse a model with fewer positions than `tokens`, which the config's `keys` say. Raises ModelError."""
    found = positions(config)
    if found is not None and found[0] < tokens:
        raise ModelError(
            f"{path}: {keys} is {tokens} tokens, and the model has {found[0]} positions ({found[1]} in its "
            f"config.json). Lower {keys} to at most {found[0]}, or use a model with more positions (the "
            "tiny model: raise model.tiny.max_positions)"
        )


def check_head_dim(path: str | Path, config: Any, device: Literal["cpu", "cuda"]) -> None:
    """Refuse a width of heads that the engine's CPU attention lacks. Raises ModelError."""
    text = config.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    head_dim = getattr(text, "head_dim", None) or (hidden // heads if heads and hidden else None)
    if device == "cpu" and head_dim is not None and head_dim not in CPU_HEAD_DIMS:
        raise ModelError(
            f"{path}: its head_dim is {head_dim}; on a CPU the engine supports {', '.join(map(str, CPU_HEAD_DIMS))} "
            "(for the tiny model, head_dim = model.tiny.hidden_size / model.tiny.heads). Use another model or a GPU"
        )


def check_heads(path: str | Path, config: Any, parts: int, key: str) -> None:
    """Refuse to cut a model's heads into so many equal parts, as the config's `key` says. Raises ModelError."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if heads is not None:
        require_head_parts(path, heads, getattr(text, "num_key_value_heads", None) or heads, parts, key)


def check_shared_rows(path: str | Path, config: Any, ranks: int) -> None:
    """Refuse a model whose rows so many ranks cannot share (`learner.sequence_parallel`). Raises ModelError."""
    key = "learner.sequence_parallel"
    check_heads(path, config, ranks, key)
    kind = config.get_text_config().model_type
    if ranks > 1 and kind in UNTOLD:
        raise ModelError(
            f"{path}: {key} is {ranks}, and transformers does not tell the attention of a {kind} model where sequences "
            f"begin; set {key} to 1, or use another model, such as Qwen or Llama"
        )


def check_layers(path: str | Path, config: Any, tokens: int, keys: str, attention: str) -> None:
    """Refuse layers that packed rows do not work with; `tokens` and `keys` as above. Raises ModelError."""
    text = config.get_text_config()
    layers: list[str] | None = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    unpackable = sorted(set(layers or ()) - set(PACKABLE_LAYERS))
    if unpackable:
        raise ModelError(
            f"{path}: layers of type {', '.join(unpackable)} cannot be trained on packed rows; use another model"
        )
    window = getattr(text, "sliding_window", None)
    if layers is not None and "sliding_attention" not in layers:
        window = None
    if window is not None and window < tokens and attention == SEGMENTED:
        raise ModelError(
            f"{path}: its attention has a sliding window of {window} tokens, and {keys} is {tokens}; attention "
            f"{SEGMENTED} cannot do that. Lower {keys} to at most {window}, or set "
            "model.attention=varlen on a GPU"
        )


def check_attention(path: str | Path, shell: PreTrainedModel) -> None:
    """Refuse a kind whose attention cannot be replaced by one for packed rows. Raises ModelError.

    `shell`: the model without memory.
    """
    text = shell.config.get_text_config()
    kind = text.model_type
    if getattr(text, "alibi", None) or kind in ("bloom", "mpt"):
        raise ModelError(
            f"{path} ({kind}): its attention adds a bias by distance (ALiBi), which attention on packed rows does not "
            "do; use a model with rotary or learned positions, such as Qwen, Llama or Mistral"
        )
    takes_ours = hasattr(sys.modules[type(shell).__module__], "ALL_ATTENTION_FUNCTIONS") or kind == FALCON
    if not takes_ours:
        raise ModelError(
            f"{path} ({kind}): transformers computes its attention, or what it has instead, in the model's own code, "
            "which does not take packed rows; use another model, such as Qwen, Llama or Mistral"
        )
