"""Looks at a policy or a reference before anything is started: its files, sizes, limits and tokenizer, no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig

from rlhf_dist.errors import ModelError
from rlhf_dist.models.attention import SEGMENTED
from rlhf_dist.models.capabilities import ROLLOUT_TOKENS, check_attention, check_head_dim, check_layers, check_positions
from rlhf_dist.models.fit import check_fit, empty_model, quiet
from rlhf_dist.models.model_config import load_config
from rlhf_dist.models.model_files import check_small_files, reason_of
from rlhf_dist.models.text_format import check_format
from rlhf_dist.models.tokenizer_files import load_tokenizer

GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def inspect(
    path: str | Path,
    chat: bool,
    device: Literal["cpu", "cuda"],
    max_tokens: int,
    attention: str = SEGMENTED,
    keys: str = ROLLOUT_TOKENS,
    system: str = "",
) -> None:
    """Refuse a model that the run could not use, before anything is started. Loads the tokenizer but no weights.

    `chat` is `data.chat`, `max_tokens` the longest sequence and `keys` the config keys that say so, `attention` what
    `choose_attention` gave, `system` is `data.system`.

    Raises ModelError: damaged or missing files, weights that are not the config's, no tokenizer, a chat template that
    cannot be used (see `text_format`), a head_dim that vLLM's CPU attention refuses, too few positions, layers that
    packed rows do not work with.
    """
    config = inspect_causal(path, max_tokens, attention, keys, device)
    _check_engine(path, config)
    _check_tokenizer(path, chat, config.get_text_config().vocab_size, system)


def inspect_causal(
    path: str | Path, max_tokens: int, attention: str, keys: str, device: Literal["cpu", "cuda"] | None = None
) -> Any:
    """The same without the tokenizer; `device`: where an engine samples from the model, if one does. The config."""
    config = load_config(path)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{path}: is of kind {config.model_type}, which is no causal language model; give one that is")
    if device is not None:
        check_head_dim(path, config, device)
    if Path(path).is_dir():
        check_small_files(Path(path))
        check_fit(Path(path), config, AutoModelForCausalLM)
    check_attention(path, empty_model(path, config, AutoModelForCausalLM))
    check_positions(path, config, max_tokens, keys)
    check_layers(path, config, max_tokens, keys, attention)
    return config


def _check_engine(path: str | Path, config: Any) -> None:
    """What the engine reads and transformers does not, or only when it saves."""
    names = config.architectures or []
    if not any(name.endswith(GENERATIVE) for name in names):
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        raise ModelError(
            f"{path}/config.json: architectures is {names or None}; the engine picks the model by it, so it must name "
            f"a causal language model, such as {kind.__name__}"
        )
    settings = Path(path) / "generation_config.json"
    if not settings.is_file():
        return
    try:
        with quiet():
            ends = GenerationConfig.from_pretrained(path).eos_token_id
    except Exception as error:
        # Here only transformers runs, and what it raises on a bad value has no common type.
        raise ModelError(f"{settings}: cannot be read: {reason_of(error)}; mend it, or take the file out") from error
    if not all(isinstance(end, int | None) for end in (ends if isinstance(ends, list) else [ends])):
        raise ModelError(f"{settings}: eos_token_id is {ends!r}; it must be the number of a token, or a list of them")


def _check_tokenizer(path: str | Path, chat: bool, vocab_size: int, system: str) -> None:
    tokenizer = load_tokenizer(path)
    check_format(tokenizer, chat, system)
    if len(tokenizer) > vocab_size:
        raise ModelError(f"{path}: its tokenizer has {len(tokenizer)} tokens, its model embeds only {vocab_size}")
