"""The canonical work of the benchmarks: a random Qwen2-shaped model of 64 tokens, short prompts, a config to train it.

End of sequence is one of 64 about equally likely tokens, so responses have a natural long tail of mean length about
50. The learning rate is 1e-8: with a real one the lengths drift, and the figures with them. For PPO a reward model of
the same shape is made too; critic and reference start from the policy.
"""

from __future__ import annotations

import json
import random
import string
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_dist.config.checks import check
from rlhf_dist.config.load import from_yaml, load, to_yaml
from rlhf_dist.config.schema import Config, TinyConfig
from rlhf_dist.errors import ConfigError
from rlhf_dist.types import Prompt

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"
CHARACTERS = string.ascii_letters + string.digits[:9]
TOKENS = [PAD, UNKNOWN, END, *CHARACTERS]
"""64: every id the model can sample is a token of its tokenizer."""
PROMPT_CHARACTERS = 9
PROMPTS = 64
HELD_OUT = 8

Algo = Literal["grpo", "ppo"]
ALGOS: tuple[Algo, ...] = ("grpo", "ppo")
FIXED_RATE = {"lr": 1e-8, "warmup_steps": 0}

CONFIG: dict[str, Any] = {
    "model": {
        "tiny": {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "layers": 8,
            "heads": 8,
            "kv_heads": 4,
            "max_positions": 512,
        }
    },
    "data": {"source": "jsonl", "chat": False, "answer_key": ""},
    "rollout": {"max_prompt_tokens": 16, "max_response_tokens": 256},
    "learner": {"optimizer": FIXED_RATE},
    "loop": {"prompts_per_step": 8, "checkpoint_every": 0},
    "eval": {"prompts": HELD_OUT, "every": 0, "samples": 0},
    "telemetry": {"wandb": "offline", "progress": "plain"},
}

OWN_KEYS = (
    *("name", "output", "model.path", "data.source", "data.path", "data.eval_path", "data.chat", "loop.steps"),
    *("algo.name", "algo.kl", "scoring.rewards", "critic.start", "critic.side_by_side", "critic.warmup_steps"),
    *("reference", "ptx"),
)
"""Set by the benchmark itself, with all below them; the limit rests on them."""


def canonical_config(folder: Path, algo: Algo, overrides: Sequence[str], steps: int) -> Config:
    """The config of a run of `steps` steps below `folder`, whose models and prompts are still to be made there.

    `overrides` are `key=value`; `model.tiny.*` are the sizes of the models. Raises `ConfigError`.
    """
    for text in overrides:
        key = text.split("=", 1)[0]
        if any(key == own or key.startswith(f"{own}.") for own in OWN_KEYS):
            raise ConfigError(
                f"{text}: the benchmark sets {key} itself; take it out (steps: --steps, algorithm: --algo)"
            )
    base = folder / "canonical.yaml"
    data = {"data": CONFIG["data"] | {"path": str(folder / "prompts.jsonl")}}
    base.write_text(yaml.safe_dump(CONFIG | data | algorithm_keys(algo, folder)), encoding="utf-8")
    config = load(base, overrides)
    return replace(
        config,
        name="ours",
        output=str(folder),
        model=replace(config.model, path=str(folder / "model")),
        loop=replace(config.loop, steps=steps),
    )


def require_overrides(words: Sequence[str]) -> None:
    """Raise `ConfigError` for a word of the command line that is no `key=value`."""
    for word in words:
        if "=" not in word:
            raise ConfigError(f"`{word}` is not of the form key=value; this benchmark takes no config file")


def algorithm_keys(algo: Algo, folder: Path) -> dict[str, Any]:
    """What the config says of the algorithm and its rewards."""
    if algo == "ppo":
        return {
            "algo": {"name": "ppo", "group_size": 8, "kl": {"coef": 0.05}},
            "critic": {"start": "policy", "optimizer": FIXED_RATE},
            "scoring": {"rewards": {"judge": {"kind": "model", "path": str(reward_folder(folder))}}},
        }
    # Shorter is better, in steps: practically no group has eight equal scores, which would not need training.
    within = {f"within_{n}": {"kind": "regex", "pattern": f".{{0,{n}}}"} for n in (5, 10, 20, 40, 80, 160)}
    return {"algo": {"name": "grpo", "group_size": 8}, "scoring": {"rewards": within}}


def reward_folder(folder: Path) -> Path:
    """Where the reward model is."""
    return folder / "reward"


def write_config(config: Config, folder: Path) -> Path:
    """Write the prompts to `folder`, check the config, and return its YAML file. The models are still to be made."""
    chance = random.Random(config.seed)
    words = ["".join(chance.choices(CHARACTERS, k=PROMPT_CHARACTERS)) for _ in range(PROMPTS + HELD_OUT)]
    Path(config.data.path).write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words), encoding="utf-8")
    check(config, "train")
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


def prompt_tokens(prompt: Prompt) -> list[int]:
    """A prompt's token ids: a character, a token, and nothing put before them."""
    return [TOKENS.index(character) for character in prompt.messages[-1].content]


def write_models(config: Config, entries: int = 0) -> None:
    """The policy, and the reward model where there is one. `entries`: see `write_model`, of the policy."""
    write_model(config.model.tiny, Path(config.model.path), entries=entries)
    for spec in config.scoring.rewards.values():
        if spec.kind == "model":
            write_model(config.model.tiny, Path(spec.path), reward=True)


def write_model(sizes: TinyConfig, folder: Path, reward: bool = False, entries: int = 0) -> None:
    """Random weights from a seed, and the tokenizer; `reward`: one score in place of the language-model head.

    `entries`: of the vocabulary, where it is larger; the others are tokens that no text is cut into, and input and
    output share one matrix then.
    """
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        Qwen2Config,
        Qwen2Tokenizer,
    )

    tokens = [*TOKENS, *(f"w{index}" for index in range(len(TOKENS), entries))]
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=[],
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
    )
    assert len(tokenizer) == len(tokens)
    shape = Qwen2Config(
        vocab_size=len(tokens),
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=sizes.max_positions,
        tie_word_embeddings=bool(entries),
        eos_token_id=TOKENS.index(END),
        pad_token_id=TOKENS.index(PAD),
        dtype="float32",
    )
    if reward:
        shape.num_labels = 1
    torch.manual_seed(sizes.seed)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    kind.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    # In a process of its own: the benchmark's stays without torch and its threads.
    write_models(from_yaml(Path(sys.argv[1]).read_text(encoding="utf-8")), *map(int, sys.argv[2:]))
