"""An engine that samples nothing, and what tests of a worker over it ask for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pumping import answered
from sample_groups import request_of

from rlhf_dist.rollout.trajectories import Response, Turn
from rlhf_dist.rollout.worker import RolloutWorker, Submit, Usage
from rlhf_dist.types import UNFINISHED, Message, Prompt, Receipt, Request
from rlhf_dist.weights.receipts import Announcement


class Engine:
    """Answers each turn with its seed (modulo 100) as its only token: two a step, the newest first."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.turns: list[Turn] = []
        self.under_way: list[Turn] = []
        self.version = 0
        self.fails: Exception | None = None
        self.prepared: list[int] = []
        self.sleeps = 0

    def submit(self, turn: Turn) -> None:
        assert turn.context, "an engine refuses a prompt without tokens"
        assert turn.key not in {other.key for other in self.under_way}
        self.turns.append(turn)
        self.under_way.append(turn)

    def step(self) -> list[Response]:
        if self.fails is not None:
            raise self.fails
        ended, self.under_way = self.under_way[:-3:-1], self.under_way[:-2]
        return [self.response(turn, "stop") for turn in ended]

    def response(self, turn: Turn, reason: str) -> Response:
        begun = [*turn.begun.tokens] if turn.begun is not None else []
        versions = [*turn.begun.versions] if turn.begun is not None else []
        version = np.array([*versions, self.version], np.int32)
        zeros = np.zeros(len(version), np.float32)
        return Response(turn.key, [*begun, turn.seed % 100], zeros, version, version, reason, "a")

    def interrupt(self, keys: Sequence[str]) -> list[Response]:
        found = self.so_far(keys)
        self.abort(keys)
        return found

    def so_far(self, keys: Sequence[str]) -> list[Response]:
        """Each has a token by now."""
        found = {turn.key: turn for turn in self.under_way}
        return [self.response(found[key], UNFINISHED) for key in keys]

    def abort(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        assert gone <= {turn.key for turn in self.turns}, "asked for at some time"
        self.under_way = [turn for turn in self.under_way if turn.key not in gone]

    def sleep(self) -> None:
        self.sleeps += 1

    def usage(self) -> Usage:
        return Usage(len(self.under_way), len(self.under_way) / 10)

    def prepare_weights(self, announcement: Announcement) -> None:
        self.prepared.append(announcement.version)

    def load_weights(self, announcement: Announcement) -> Receipt:
        if self.fails is not None:
            raise self.fails
        self.version = announcement.version
        return Receipt("w", announcement.version, announcement.hashes, {"a": 4})


def asked(*texts: str, n: int = 1) -> list[Request]:
    prompts = [Prompt(f"0/{i}", (Message("user", text),), "", "test") for i, text in enumerate(texts)]
    return [request_of(prompt, n) for prompt in prompts]


def submit(*requests: Request) -> Submit:
    return Submit(tuple(requests))


def uids(events: Iterable[Any]) -> list[str]:
    return [event.head.uid for event in answered(events)]


def talking(engine: Engine, limit: int) -> RolloutWorker:
    """Every first response is answered by one more turn, through the tiny model's own template."""
    return RolloutWorker(
        "w", engine, chat=True, max_prompt_tokens=limit, observe=lambda _, said: "no" if len(said) == 1 else None
    )
