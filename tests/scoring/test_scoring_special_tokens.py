"""Rewards that name a special token which is left out of the text that they see."""

from __future__ import annotations

import re
from typing import Any

import pytest
from small_tokenizers import small_tokenizer

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.scoring.special_tokens import hidden_token_warnings

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HIDDEN = r"keep_special_tokens=true$"


@pytest.mark.parametrize(
    ("spec", "answers", "words"),
    [
        ({"kind": "regex", "pattern": "<think>.*</think>.*"}, [], rf"names </think>, <think>, special .*{HIDDEN}"),
        ({"kind": "regex", "pattern": r"\<think\>.*"}, [], HIDDEN),
        ({"kind": "regex", "pattern": r"(</?think>).*"}, [], HIDDEN),
        ({"kind": "regex", "pattern": r".*<\|user\|>.*"}, [], HIDDEN),
        ({"kind": "regex", "pattern": r".*</s>"}, [], r"names </s>, which ends a response and is never .*: take it"),
        ({"kind": "regex", "pattern": r".*<\|eot\|>", "keep_special_tokens": True}, [], r"names <\|eot\|>, which ends"),
        ({"kind": "regex", "pattern": "<think>.*", "keep_special_tokens": True}, [], ""),
        ({"kind": "regex", "pattern": "<thought>.*"}, [], ""),
        ({"kind": "exact"}, ["1", "<think>a</think>2"], rf"answers that hold </think>, <think>.*{HIDDEN}"),
        ({"kind": "exact"}, ["1</s>"], "answers that hold </s>, which ends a response .*: take it out of the answers"),
        ({"kind": "exact"}, ["1"], ""),
        ({"kind": "function", "function": "a:b"}, ["<think>"], ""),
    ],
)
def test_what_a_reward_cannot_see_is_told_with_the_key(spec: dict[str, Any], answers: list[str], words: str) -> None:
    tokenizer = small_tokenizer(TEMPLATE)
    found = hidden_token_warnings({"mine": RewardSpec(**spec)}, answers, tokenizer, chat=True)
    assert len(found) == bool(words) and all(re.search(words, text) for text in found), found
