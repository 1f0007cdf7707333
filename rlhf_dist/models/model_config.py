"""config.json: read, checked before transformers sees it, and loaded. No code from the model's repository is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rlhf_dist.errors import ModelError
from rlhf_dist.models.model_files import is_there, read_object, reason_of

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
QUANTIZED = ("quantization_config", "compression_config")
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
"""By the names that transformers gives them in every kind of model; heads before head_dim, which may divide by them."""
SIZE_KEYS = (
    *SIZES,
    *(
        "max_position_embeddings",
        "n_positions",
        "n_ctx",
        "n_embd",
        "n_layer",
        "n_head",
        "n_inner",
        "n_layers",
        "n_heads",
    ),
    *("d_model", "num_heads", "num_layers", "num_kv_heads", "ffn_dim", "ffn_hidden_size", "word_embed_proj_dim"),
)
"""The same as files have them: transformers divides by some of them before there is a config to look at."""
DTYPES = ("dtype", "torch_dtype")
LARGEST = 2**31 - 1
MOST_LAYERS = 10_000
"""To build more, even without memory, would take for ever."""


def load_config(path: str | Path) -> Any:
    """The transformers config of a Hugging Face directory or hub name.

    Raises ModelError: there is none, it is damaged, of an unknown kind or of a quantised model, or has sizes that no
    model can have.
    """
    raw = _read(Path(path)) if Path(path).is_dir() else {}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        # Here only transformers runs, and what it raises on a config that it cannot use has no common type.
        if "auto_map" in raw:
            raise ModelError(
                f"{Path(path) / CONFIG}: transformers has no model_type {raw.get('model_type')!r} of its own; auto_map "
                "names code in the model's directory, and such code is never run. Use a model that transformers knows"
            ) from error
        raise unloadable(path, "config", error) from error
    _check_sizes(path, config, raw)
    return config


def unloadable(path: str | Path, what: str, error: Exception) -> ModelError:
    """What to raise when transformers could not load `what` of `path`."""
    if Path(path).is_dir():
        return ModelError(f"{path}: its {what} cannot be loaded: {reason_of(error)}")
    return ModelError(
        f"model.path = {path}: no such directory here, and its {what} cannot be loaded from the hub: "
        f"{reason_of(error)} Check the name, or download the model on a machine with access and give its directory"
    )


def _read(directory: Path) -> dict[str, Any]:
    """What config.json says, with the checks that need no transformers."""
    path = directory / CONFIG
    there = is_there(path)
    if (directory / ADAPTER).exists():
        if not there:
            raise ModelError(
                f"{directory}: is an adapter (LoRA) without its base model; merge the two with peft's "
                "merge_and_unload, save the result with save_pretrained, and give that directory"
            )
        raise ModelError(
            f"{directory / ADAPTER}: transformers would apply this adapter, and the engine would not; merge it into "
            "the model with peft's merge_and_unload, or remove the file"
        )
    if not there:
        raise ModelError(f"{directory}: has no {CONFIG}, so it is no Hugging Face model directory")
    raw = read_object(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or not kind:
        # transformers would guess from the directory's name
        raise ModelError(f"{path}: model_type is {kind!r}; it must name the kind of the model, such as llama")
    for key in QUANTIZED:
        if raw.get(key):
            method = raw[key].get("quant_method") if isinstance(raw[key], dict) else None
            raise ModelError(
                f"{path}: {key} says that the weights are quantised ({method or 'no method named'}), and quantised "
                "weights cannot be trained; give the model in float32, bfloat16 or float16"
            )
    if raw.get("transformers_weights"):
        raise ModelError(
            f"{path}: transformers_weights is {raw['transformers_weights']!r}; only model.safetensors and its index "
            "are read. Take the key out"
        )
    for sizes in (raw, raw.get("text_config")):
        if not isinstance(sizes, dict):
            continue
        for key in SIZE_KEYS:
            # Lists, one a layer, and null are left to transformers, which knows where they can stand.
            if not isinstance(value := sizes.get(key), list | None):
                _check_size(path, key, value)
        for key in DTYPES:
            name = str(sizes.get(key) or "float32").removeprefix("torch.")
            if name != "auto" and not isinstance(getattr(torch, name, None), torch.dtype):
                raise ModelError(f"{path}: {key} is {sizes[key]!r}; it must name a dtype of torch, such as bfloat16")
    architectures = raw.get("architectures")
    if not isinstance(architectures, list | None) or not all(isinstance(name, str) for name in architectures or ()):
        raise ModelError(f"{path}: architectures is {architectures!r}; it must be a list of names")
    return raw


def _check_size(path: Path, key: str, value: Any) -> None:
    most = MOST_LAYERS if "layer" in key else LARGEST
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most:
        raise ModelError(f"{path}: {key} is {value!r}; it must be an integer between 1 and {most}")


def _check_sizes(path: str | Path, config: Any, raw: dict[str, Any]) -> None:
    """Refuse sizes that no model has: libraries divide by them and fail far from here. Raises ModelError."""
    text = config.get_text_config()
    found: dict[str, int] = {}
    for name in SIZES:
        value = getattr(text, name, None)
        if value is None or isinstance(value, list | tuple):  # some kinds have one a layer
            continue
        _check_size(Path(path) / CONFIG, _key(text, name), value)
        found[name] = value
    hidden, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if hidden is None or heads is None:
        return
    own = raw.get("text_config") or raw
    if hidden % heads and not own.get("head_dim") and found.get("head_dim") in (None, hidden // heads):
        raise ModelError(
            f"{path}/{CONFIG}: {_key(text, 'hidden_size')} is {hidden}; it must be a multiple of "
            f"{_key(text, 'num_attention_heads')}, {heads}"
        )
    if heads % found.get("num_key_value_heads", 1):
        raise ModelError(
            f"{path}/{CONFIG}: {_key(text, 'num_key_value_heads')} is {found['num_key_value_heads']}; it must divide "
            f"{_key(text, 'num_attention_heads')}, {heads}"
        )


def _key(text: Any, name: str) -> str:
    """What this kind of model calls it: n_embd for GPT-2's hidden_size."""
    return text.attribute_map.get(name, name)
