"""The tiny model: a Qwen2-shaped causal LM made from a seed, with its own tokenizer. No download."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.directory import atomic_directory
from rlhf_dist.models.tokenizer import CHARACTERS, CHAT_TEMPLATE, END, PAD, character_tokenizer

LEARNS_FASTER: dict[str, Any] = {
    # Positions a few tokens apart have to be told from each other; the usual base of 10,000 is for thousands of tokens.
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    # Tied, and larger at the start than the usual 0.02: a hundred characters, and a few minutes to learn them in.
    "tie_word_embeddings": True,
    "initializer_range": 0.04,
}
"""For a few hundred steps on a CPU; after 150 supervised steps on reversing, nearly twice as many words are right."""


def make_tiny(config: TinyConfig, cache: Path) -> Path:
    """Make the tiny model below `cache` and return its Hugging Face directory; a second call finds it there.

    The directory's name holds a hash of `config` and of the tokenizer. The same config gives the same weights, and
    the global random state is left as it was. Weights are float32.

    Raises DiskError when it cannot be written. That the sizes fit each other is checked with the config.
    """
    key = json.dumps([asdict(config), CHARACTERS, CHAT_TEMPLATE, LEARNS_FASTER], sort_keys=True)
    target = cache / f"tiny-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    tokenizer = character_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen2ForCausalLM(_model_config(config, tokenizer))
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    with atomic_directory(target, replace=False) as directory:
        # Not `model.save_pretrained`: it imports DeepSpeed, to unwrap what may be one of its engines, which takes
        # seconds and prints over the user's screen, as does its progress bar.
        tied = model.all_tied_weights_keys
        weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        model.generation_config.save_pretrained(directory)
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
        **LEARNS_FASTER,
        eos_token_id=tokenizer.get_vocab()[END],
        pad_token_id=tokenizer.get_vocab()[PAD],
        dtype="float32",
    )
