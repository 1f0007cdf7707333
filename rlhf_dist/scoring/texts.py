"""Responses as text: what rewards see that do not read the policy's own tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlhf_dist.errors import ConfigError
from rlhf_dist.types import Group, Message, Trajectory


@dataclass(frozen=True, slots=True)
class Texts:
    """n responses, each with its own prompt; a group's share one."""

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
    uids: tuple[str, ...] = ()
    """n of the prompts; empty where the responses are of no run."""

    def only(self, i: int) -> Texts:
        """Response i by itself."""
        return Texts(
            self.prompts[i : i + 1],
            self.responses[i : i + 1],
            self.answers[i : i + 1],
            self.conversations[i : i + 1],
            self.ended[i : i + 1],
            self.uids[i : i + 1],
        )


def read_text(path: str, key: str) -> str:
    """A file of a config, whole, in UTF-8. Raises ConfigError naming the key."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key}={path}: it cannot be read here: {error}") from None


def texts_of(group: Group, special: bool = False) -> Texts:
    """A group's last responses as text; `special`: with the special tokens inside them."""
    prompt, n = group.prompt, len(group.trajectories)
    asked = next(message.content for message in reversed(prompt.messages) if message.role == "user")
    return Texts(
        prompts=(asked,) * n,
        responses=tuple((sample.special_texts if special else sample.texts)[-1] for sample in group.trajectories),
        answers=(prompt.answer,) * n,
        conversations=tuple(prompt.messages + turns_between(sample) for sample in group.trajectories),
        ended=tuple(sample.finish_reason == "stop" for sample in group.trajectories),
        uids=(prompt.uid,) * n,
    )


def turns_between(sample: Trajectory) -> tuple[Message, ...]:
    """What was said after the prompt and before the last response."""
    segments, texts = sample.segments[1:-1], sample.texts[:-1]
    return tuple(Message(segment.role, text) for segment, text in zip(segments, texts, strict=True))
