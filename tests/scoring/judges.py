"""Small reward models and rollouts for the tests of scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sample_groups import group_of
from transformers import Qwen2Tokenizer

from rlhf_dist.config.schema import ModelConfig, RewardSpec, ScoringConfig
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.models.scalar import ScoreScale, load_scalar, save_scalar
from rlhf_dist.models.tokenizer import CHAT_TEMPLATE, END, PAD, UNKNOWN
from rlhf_dist.scoring.reward_model import ModelSetting, RewardModel
from rlhf_dist.scoring.texts import Texts
from rlhf_dist.types import Group, Message, Prompt

SCALE = ScoreScale(0.5, 2.0)
MESSAGES = (Message("system", "be kind"), Message("user", "say hi"))


def make_judge(policy: Path, target: Path) -> Path:
    """A reward model of the policy's shape and tokenizer with a random head, normalised by SCALE."""
    model = load_scalar(policy, "float32", "segmented")
    generator = torch.Generator().manual_seed(5)
    head: Any = model.get_submodule("score")
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator))
    return save_scalar(model, policy, target, SCALE)


def set_other_tokenizer(judge: Path) -> Any:
    """Give a reward model the same characters in another order, and another way to write a turn."""
    own: Any = load_tokenizer(judge)
    # The pad token keeps its number, which is in the model's config: transformers reads the last token that is not it.
    names = sorted(own.get_vocab(), key=lambda name: (name != PAD, name))
    for path in judge.glob("*token*"):
        path.unlink()
    other = Qwen2Tokenizer(
        vocab={name: index for index, name in enumerate(names)},
        merges=[],
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        chat_template=CHAT_TEMPLATE.replace(
            "message['role'] + '|>'", "message['role'].replace('system', 'user') + '|>'"
        ),
    )
    other.save_pretrained(judge)
    return load_tokenizer(judge)


def setting(policy: Path | None, **changes: Any) -> ModelSetting:
    made = ModelSetting(
        policy="" if policy is None else str(policy),
        max_tokens=100,
        chat=True,
        model=ModelConfig(),
        device="cpu",
        cache=Path("unused"),
    )
    return replace(made, **changes)


def judge_spec(path: Path | str, **changes: Any) -> RewardSpec:
    return RewardSpec(kind="model", path=str(path), **changes)


def open_judge(path: Path, policy: Path | None, budget: int = 200, **changes: Any) -> RewardModel:
    scoring = ScoringConfig(batch_tokens=budget, timeout_s=60)
    return RewardModel("judge", judge_spec(path, **changes), scoring, setting(policy))


def make_rollout(policy: Path, responses: Sequence[str], ended: Sequence[bool], answer: str = "") -> Group:
    """What a policy with this tokenizer would have said."""
    tokenizer: Any = load_tokenizer(policy)
    turns = [{"role": m.role, "content": m.content} for m in MESSAGES]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    ids = [
        tokenizer.encode(text) + ([tokenizer.eos_token_id] if end else [])
        for text, end in zip(responses, ended, strict=True)
    ]
    tokens = [token for row in ids for token in row]
    return group_of(
        prompt,
        tokens,
        [len(row) for row in ids],
        prompt=Prompt("0/1", MESSAGES, answer, "test"),
        logprobs=np.linspace(-3, -1, len(tokens)),
        reasons=["stop" if end else "length" for end in ended],
        texts=responses,
    )


def make_texts(responses: Sequence[str], answers: Sequence[str] = ()) -> Texts:
    n = len(responses)
    return Texts(
        prompts=("say hi",) * n,
        responses=tuple(responses),
        answers=tuple(answers) or ("",) * n,
        conversations=(MESSAGES,) * n,
        ended=(True,) * n,
    )
