"""A rollout worker: renders prompts, has an engine sample their responses, and hands out one group after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, Protocol

from rlhf_dist.data.render import render
from rlhf_dist.rollout.trajectories import Response, Turn, head_of, single_turn
from rlhf_dist.types import DroppedPrompt, Group, GroupHead, Receipt, Request
from rlhf_dist.weights.receipts import Announcement


class Engine(Protocol):
    """What a worker needs of an inference engine: responses, one by one. It knows of no groups."""

    tokenizer: Any

    def submit(self, turn: Turn) -> None:
        """Begin to sample a response; its key is one that is not under way."""
        ...

    def step(self) -> list[Response]:
        """One decoding step of everything under way; the responses that end with it."""
        ...

    def abort(self, keys: Iterable[str]) -> None:
        """End responses that are under way; nothing is heard of them any more."""
        ...

    def load_weights(self, announcement: Announcement) -> Receipt: ...


class OpenGroup:
    """The samples of a request while they are made."""

    def __init__(self, request: Request, prompt: Sequence[int]) -> None:
        self._request = request
        self._prompt = prompt
        self._responses: dict[int, Response] = {}

    def turn(self, sample: int, key: str) -> Turn:
        """What an engine is asked for; `key` is the caller's."""
        return Turn(key, self._prompt, self._request.sampling, self._request.seeds[sample])

    def add(self, sample: int, response: Response) -> Group | None:
        """Take the response of one sample; the group, where it was the last."""
        self._responses[sample] = response
        if len(self._responses) < self._request.n:
            return None
        ordered = (self._responses[number] for number in range(self._request.n))
        return Group(self._request, tuple(single_turn(self._prompt, response) for response in ordered))


class RolloutWorker:
    """A generator over an engine."""

    def __init__(self, name: str, engine: Engine, *, chat: bool, max_prompt_tokens: int) -> None:
        self.name = name
        self._engine = engine
        self._chat = chat
        self._max_prompt_tokens = max_prompt_tokens
        self._numbers = count()

    def generate(self, requests: Sequence[Request]) -> Iterator[GroupHead | Group | DroppedPrompt]:
        """Sample each request's prompt; yields, as groups finish, a head and then its group.

        Two items, so that the caller can read the small one and leave the tokens where they are. A prompt that is too
        long, or has no tokens, yields one `DroppedPrompt`. Each sample is a request of its own to the engine, with its
        own seed, so what is sampled does not depend on what else is under way.
        """
        accepted: list[tuple[Request, list[int]]] = []
        for request in requests:
            tokens = render(self._engine.tokenizer, request.prompt.messages, self._chat)
            if not tokens:
                yield DroppedPrompt(request.uid, "prompt_empty", "the tokenizer knows none of its characters")
            elif len(tokens) <= self._max_prompt_tokens:
                accepted.append((request, tokens))
            else:
                limit = f"rollout.max_prompt_tokens is {self._max_prompt_tokens}"
                yield DroppedPrompt(request.uid, "prompt_too_long", f"{len(tokens)} tokens; {limit}")
        under_way: dict[str, tuple[OpenGroup, int]] = {}
        try:
            for request, tokens in accepted:
                self._submit(request, OpenGroup(request, tokens), under_way)
            while under_way:
                for response in self._engine.step():
                    group, sample = under_way.pop(response.key)
                    finished = group.add(sample, response)
                    if finished is not None:
                        yield head_of(finished, self.name)
                        yield finished
        finally:
            # The caller went away in the middle: nothing of it may run on into the next call.
            self._engine.abort(under_way)

    def load_weights(self, announcement: Announcement) -> Receipt:
        """Load a published version; the receipt says what arrived."""
        return self._engine.load_weights(announcement)

    def ready(self) -> str:
        """Answers once the engine is up: the caller's sign that it can be used."""
        return self.name

    def _submit(self, request: Request, group: OpenGroup, under_way: dict[str, tuple[OpenGroup, int]]) -> None:
        for sample in range(request.n):
            # The number tells apart what is asked twice, such as an evaluation's greedy and sampled responses.
            key = f"{next(self._numbers)}/{request.purpose}/{request.uid}/{sample}"
            self._engine.submit(group.turn(sample, key))
            under_way[key] = group, sample
