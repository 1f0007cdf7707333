"""Small tokenizers, one token a byte, with any special tokens, post-processor and chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AddedToken, PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|eot|>", "<think>", "</think>", "[CLS]", "[SEP]")


def byte_letters() -> list[str]:
    """How byte-level BPE spells the 256 bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def small_tokenizer(
    template: str | dict[str, str] | None = None,
    single: str = "$A",
    plain: Sequence[str] = (),
    special: Sequence[str] = SPECIAL,
    **options: Any,
) -> PreTrainedTokenizerFast:
    """`single`: what the post-processor makes of a text `$A`; `plain`: added tokens that are not special."""
    vocabulary = {token: number for number, token in enumerate((*special, *byte_letters()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    named = [(token, vocabulary[token]) for token in special if token in single.split()]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        **{
            "bos_token": "<s>",
            "eos_token": "</s>",
            "additional_special_tokens": [token for token in special if token not in ("<s>", "</s>")],
            **options,
        },
    )
    for token in plain:
        tokenizer.add_tokens(AddedToken(token, special=False, normalized=False))
    tokenizer.chat_template = template
    return tokenizer
