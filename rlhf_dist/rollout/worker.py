"""A rollout worker: renders prompts, asks the engine, and hands out one group after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from rlhf_dist.data.render import render
from rlhf_dist.types import DroppedPrompt, Prompt, Receipt, Rollout, RolloutHead, Sampling
from rlhf_dist.weights.receipts import Announcement


class Engine(Protocol):
    """What a worker needs of an inference engine."""

    tokenizer: Any

    def generate(self, prompts: Sequence[tuple[Prompt, list[int]]], sampling: Sampling) -> Iterator[Rollout]: ...

    def load_weights(self, announcement: Announcement) -> Receipt: ...


class RolloutWorker:
    """A generator over an engine."""

    def __init__(self, name: str, engine: Engine, *, chat: bool, max_prompt_tokens: int) -> None:
        self.name = name
        self._engine = engine
        self._chat = chat
        self._max_prompt_tokens = max_prompt_tokens

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[RolloutHead | Rollout | DroppedPrompt]:
        """Sample each prompt `sampling.n` times; yields, as groups finish, a head and then its rollout.

        Two items, so that the caller can read the small one and leave the tokens where they are. A prompt that is too
        long, or has no tokens, yields one `DroppedPrompt`.
        """
        accepted = []
        for prompt in prompts:
            tokens = render(self._engine.tokenizer, prompt.messages, self._chat)
            if not tokens:
                yield DroppedPrompt(prompt.uid, "prompt_empty", "the tokenizer knows none of its characters")
            elif len(tokens) <= self._max_prompt_tokens:
                accepted.append((prompt, tokens))
            else:
                limit = f"rollout.max_prompt_tokens is {self._max_prompt_tokens}"
                yield DroppedPrompt(prompt.uid, "prompt_too_long", f"{len(tokens)} tokens; {limit}")
        for rollout in self._engine.generate(accepted, sampling):
            yield head_of(rollout, self.name)
            yield rollout

    def load_weights(self, announcement: Announcement) -> Receipt:
        """Load a published version; the receipt says what arrived."""
        return self._engine.load_weights(announcement)

    def ready(self) -> str:
        """Answers once the engine is up: the caller's sign that it can be used."""
        return self.name


def head_of(rollout: Rollout, worker: str) -> RolloutHead:
    """The small part of a rollout."""
    return RolloutHead(
        uid=rollout.prompt.uid,
        prompt_length=len(rollout.prompt_tokens),
        lengths=np.diff(rollout.offsets),
        finish_reasons=rollout.finish_reasons,
        oldest_version=int(rollout.versions.min()),
        newest_version=int(rollout.versions.max()),
        worker=worker,
    )
