"""Responses as text: what rewards see that do not read the policy's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.types import Message, Rollout


@dataclass(frozen=True, slots=True)
class Texts:
    """n responses, each with its own prompt; a rollout's share one."""

    prompts: tuple[str, ...]
    """n texts of the last user turn."""
    responses: tuple[str, ...]
    """n texts; special tokens are left out but for rewards that ask for them (`keep_special_tokens`)."""
    answers: tuple[str, ...]
    """n; empty where the data has none."""
    conversations: tuple[tuple[Message, ...], ...]
    """n; the whole conversation before the response, which reward models read."""
    ended: tuple[bool, ...]
    """n; false for a response that was cut before its end."""


def texts_of(rollout: Rollout, special: bool = False) -> Texts:
    """A group's responses as text; `special`: with the special tokens inside them."""
    prompt, n = rollout.prompt, len(rollout.texts)
    asked = next(message.content for message in reversed(prompt.messages) if message.role == "user")
    return Texts(
        prompts=(asked,) * n,
        responses=rollout.special_texts if special else rollout.texts,
        answers=(prompt.answer,) * n,
        conversations=(prompt.messages,) * n,
        ended=tuple(reason == "stop" for reason in rollout.finish_reasons),
    )
