"""Rewards that look for a special token in a response's text, which is not there unless they ask for it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.models.text_format import hidden_tokens, text_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def hidden_token_warnings(
    rewards: Mapping[str, RewardSpec], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat: bool
) -> list[str]:
    """A sentence for each reward whose pattern, or whose answers, name a special token that it does not see."""
    ends = text_format(tokenizer, chat).end_texts
    hidden = [token for token in hidden_tokens(tokenizer) if len(token) > 1]
    return [text for name, spec in rewards.items() for text in _of_reward(name, spec, answers, hidden, ends)]


def _of_reward(
    name: str, spec: RewardSpec, answers: Sequence[str], hidden: Sequence[str], ends: Sequence[str]
) -> Iterator[str]:
    key = f"scoring.rewards.{name}"
    if spec.kind == "regex":
        named = [token for token in {*hidden, *ends} if _named(token, spec.pattern)]
        what, never = f"{key}.pattern names", f"take it out of {key}.pattern"
    elif spec.kind == "exact":
        named = [token for token in {*hidden, *ends} if any(token in answer for answer in answers)]
        what, never = f"the reward {name} compares with answers that hold", "take it out of the answers"
    else:
        return
    closing = sorted(token for token in named if token in ends)
    inside = sorted(token for token in named if token not in ends)
    if closing:
        yield f"{what} {', '.join(closing)}, which ends a response and is never part of its text: {never}"
    if inside and not spec.keep_special_tokens:
        yield (
            f"{what} {', '.join(inside)}, special in the model's tokenizer and left out of a response's text, so that "
            f"no response would match: set {key}.keep_special_tokens=true"
        )


def _named(token: str, pattern: str) -> bool:
    """Whether a pattern has the token's text, with or without a backslash, a question mark or a group inside."""
    return token in pattern.replace("\\", "") or token in re.sub(r"[\\?()]", "", pattern)
