"""A rollout worker: renders prompts, asks the engine, and hands out one group after another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rlhf_dist.data.render import render
from rlhf_dist.rollout.trajectories import head_of
from rlhf_dist.types import DroppedPrompt, Group, GroupHead, Receipt, Request
from rlhf_dist.weights.receipts import Announcement


class Engine(Protocol):
    """What a worker needs of an inference engine."""

    tokenizer: Any

    def generate(self, asked: Sequence[tuple[Request, list[int]]]) -> Iterator[Group]: ...

    def load_weights(self, announcement: Announcement) -> Receipt: ...


class RolloutWorker:
    """A generator over an engine."""

    def __init__(self, name: str, engine: Engine, *, chat: bool, max_prompt_tokens: int) -> None:
        self.name = name
        self._engine = engine
        self._chat = chat
        self._max_prompt_tokens = max_prompt_tokens

    def generate(self, requests: Sequence[Request]) -> Iterator[GroupHead | Group | DroppedPrompt]:
        """Sample each request's prompt; yields, as groups finish, a head and then its group.

        Two items, so that the caller can read the small one and leave the tokens where they are. A prompt that is too
        long, or has no tokens, yields one `DroppedPrompt`.
        """
        accepted = []
        for request in requests:
            tokens = render(self._engine.tokenizer, request.prompt.messages, self._chat)
            if not tokens:
                yield DroppedPrompt(request.uid, "prompt_empty", "the tokenizer knows none of its characters")
            elif len(tokens) <= self._max_prompt_tokens:
                accepted.append((request, tokens))
            else:
                limit = f"rollout.max_prompt_tokens is {self._max_prompt_tokens}"
                yield DroppedPrompt(request.uid, "prompt_too_long", f"{len(tokens)} tokens; {limit}")
        for group in self._engine.generate(accepted):
            yield head_of(group, self.name)
            yield group

    def load_weights(self, announcement: Announcement) -> Receipt:
        """Load a published version; the receipt says what arrived."""
        return self._engine.load_weights(announcement)

    def ready(self) -> str:
        """Answers once the engine is up: the caller's sign that it can be used."""
        return self.name
