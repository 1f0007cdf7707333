"""The samples of one request while they are made: of each, whose turn it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from rlhf_dist.rollout.trajectories import Exchange, Response, Turn, conversation, exchanges_of
from rlhf_dist.types import POLICY_ROLE, UNFINISHED, Group, Message, Prompt, Request

Observe = Callable[[Prompt, Sequence[str]], str | None]
"""(prompt, the policy's responses so far) -> what the user says next; None: the conversation is at its end."""
Between = Callable[[Sequence[Message], int], list[int]]
"""(conversation up to what the user says last, last token of the response before it) -> the tokens that stand between
that response and the next."""
SEEDS = 2**63
"""A seed is below."""


def nothing_more(prompt: Prompt, responses: Sequence[str]) -> None:
    """Of tasks with a single turn."""


class OpenGroup:
    """Keys of turns are `REQUEST KEY/SAMPLE/TURN`."""

    def __init__(
        self, request: Request, prompt: Sequence[int], observe: Observe, between: Between, begun: Group | None = None
    ) -> None:
        """`prompt`: its tokens. `begun`: the samples as another worker left them (`partial`)."""
        # Whoever has the group must not keep what it went on from.
        self.request = replace(request, begun=None)
        self._observe = observe
        self._between = between
        self._read: list[list[tuple[Sequence[int], str]]] = [[(prompt, "")] for _ in range(request.n)]
        """By sample: tokens and text of all that it was given to read; the last is what it answers now."""
        self._said: list[list[Response]] = [[] for _ in range(request.n)]
        self._begun: dict[int, Response] = {}
        """Sample -> beginning of the response that it is to go on with."""
        for sample, trajectory in enumerate(begun.trajectories if begun is not None else ()):
            exchanges = exchanges_of(trajectory)
            self._read[sample] = [(one.read, one.text) for one in exchanges]
            self._said[sample] = [one.response for one in exchanges]
            if trajectory.finish_reason == UNFINISHED:
                self._begun[sample] = self._said[sample].pop()
        self._waits_for = len(self.under_way)
        """Turns that have no response yet."""

    @property
    def is_new(self) -> bool:
        """Whether no response has come yet."""
        return not any(self._said)

    @property
    def under_way(self) -> list[str]:
        """Keys of the turns that have no response yet."""
        open_turns = ((i, len(said)) for i, said in enumerate(self._said) if len(said) < len(self._read[i]))
        return [f"{self.request.key}/{sample}/{turn}" for sample, turn in open_turns]

    def first(self) -> list[Turn]:
        """One turn of each sample that waits for a response."""
        return [self._turn(sample) for sample in map(sample_of, self.under_way)]

    def add(self, response: Response) -> list[Turn]:
        """Take a response; the sample's next turn, where it has one."""
        sample = sample_of(response.key)
        said, prompt = self._said[sample], self.request.prompt
        said.append(response)
        self._waits_for -= 1
        observation = self._observe(prompt, [one.text for one in said])
        if observation is None:
            return []
        messages = [*prompt.messages]
        for one, (_, read) in zip(said, [*self._read[sample][1:], ((), observation)], strict=True):
            messages += [Message(POLICY_ROLE, one.text), Message("user", read)]
        self._waits_for += 1
        self._read[sample].append((self._between(messages, response.tokens[-1]), observation))
        return [self._turn(sample)]

    def whole(self) -> Group | None:
        """The group, once no sample has a turn under way."""
        return None if self._waits_for else self.partial(())

    def partial(self, unfinished: Iterable[Response]) -> Group:
        """The group as it is; `unfinished`: what there is of each turn that is under way."""
        said = [[*responses] for responses in self._said]
        for response in unfinished:
            said[sample_of(response.key)].append(response)
        samples = [
            conversation([Exchange(tokens, text, one) for (tokens, text), one in zip(read, responses, strict=True)])
            for read, responses in zip(self._read, said, strict=True)
        ]
        return Group(self.request, tuple(samples))

    def _turn(self, sample: int) -> Turn:
        read, said, request = self._read[sample], self._said[sample], self.request
        context = [*read[0][0]]
        for response, (tokens, _) in zip(said, read[1:], strict=True):
            context += [*response.tokens, *tokens]
        # Another seed for each turn: with one, the same chances would come again.
        seed, begun = (request.seeds[sample] + len(said)) % SEEDS, self._begun.pop(sample, None)
        if begun is not None and begun.tokens:
            seed = seed_after(seed, len(begun.tokens))
        return Turn(f"{request.key}/{sample}/{len(said)}", context, request.sampling, seed, begun)


def seed_after(seed: int, tokens: int) -> int:
    """Of a response's rest, from its own seed and the tokens that it has; for the same reason."""
    digest = hashlib.blake2b(f"{seed}/{tokens}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % SEEDS


def sample_of(turn_key: str) -> int:
    """The number of a turn's sample."""
    return int(turn_key.rsplit("/", 2)[1])


def request_of(turn_key: str) -> str:
    """The key of a turn's request."""
    return turn_key.rsplit("/", 2)[0]
