"""The tiny model: a Qwen2-shaped causal LM made from a seed, with its own tokenizer. No download."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.directory import atomic_directory
from rlhf_dist.models.tokenizer import CHARACTERS, CHAT_TEMPLATE, END, PAD, character_tokenizer


def make_tiny(config: TinyConfig, cache: Path) -> Path:
    """Make the tiny model below `cache` and return its Hugging Face directory; a second call finds it there.

    The directory's name holds a hash of `config` and of the tokenizer. The same config gives the same weights, and
    the global random state is left as it was. Weights are float32, input and output embeddings are not tied.

    Raises DiskError when it cannot be written. That the sizes fit each other is checked with the config.
    """
    key = json.dumps([asdict(config), CHARACTERS, CHAT_TEMPLATE], sort_keys=True)
    target = cache / f"tiny-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2ForCausalLM(_model_config(config, tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with atomic_directory(target, replace=False) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return target


def _model_config(config: TinyConfig, tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),  # no row more: a random model would sample it, and no tokenizer could decode it
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.get_vocab()[END],
        pad_token_id=tokenizer.get_vocab()[PAD],
        dtype="float32",
    )
