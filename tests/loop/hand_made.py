"""A controller that is told what happens by hand, one event after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.events import (
    Book,
    Command,
    Compared,
    Event,
    Kept,
    MemberKind,
    Published,
    ReferenceKept,
    Scored,
    Serving,
    Submit,
    Taken,
)
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.requests import make_requests
from rlhf_dist.types import (
    Answered,
    DroppedPrompt,
    GroupHead,
    Handle,
    Message,
    NonFinite,
    Prompt,
    Purpose,
    Referenced,
    ReferenceHead,
    Request,
    Sampling,
    Scores,
    Unanswered,
)

CommandT = TypeVar("CommandT")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8, stop=())


def rules_with(**changes: Any) -> Rules:
    """One group of two samples a step, three steps, no lag; but for `changes`."""
    plain: dict[str, Any] = {
        "groups_per_step": 1,
        "steps": 3,
        "max_lag": 0,
        "target_lag": 0,
        "window": 1,
        "extra_groups": 0,
        "age": "oldest",
        "drop_stale": True,
        "filter_groups": False,
        "filtered": 4,
        "group_size": 2,
        "sampling": SAMPLING,
        "seed": 1,
        "greedy_baseline": False,
        "compares": False,
        "max_failed_share": 0.1,
    }
    return Rules(**plain | changes)


def prompt(uid: str) -> Prompt:
    return Prompt(uid, (Message("user", "x"),), "", "test")


def held_out(count: int, purpose: Purpose = "eval", sampling: Sampling = SAMPLING) -> tuple[Request, ...]:
    """Requests of an evaluation, uids `held/0` ...; one sample each."""
    return tuple(make_requests([prompt(f"held/{n}") for n in range(count)], purpose, 1, sampling, 1))


class FewPrompts:
    """Uids `0/0`, `0/1` ..., behind what a resume issues again."""

    def __init__(self, epoch: int = 100, again: Iterable[tuple[str, int]] = ()) -> None:
        self._epoch = epoch
        self._given = 0
        self._again = list(again)

    def __len__(self) -> int:
        return self._epoch

    def take(self, n: int) -> list[tuple[Prompt, int]]:
        found = [(prompt(uid), attempt) for uid, attempt in self._again[:n]]
        self._again = self._again[n:]
        while len(found) < n:
            found.append((prompt(f"0/{self._given}"), 0))
            self._given += 1
        return found


class Rig:
    """Workers `a`, `b` ... that serve, scoring server `s`, reference server `r`, and all commands so far."""

    def __init__(
        self, rules: Rules, workers: str = "a", capacity: int = 100, healing: Healing | None = None, **stream: Any
    ) -> None:
        limits: dict[MemberKind, float] = {"rollout": 10.0, "scoring": 20.0, "reference": 30.0, "collator": 40.0}
        self.members = Members(workers, "s", "r", capacity=capacity, limits_s=limits, beat_s=0.0)
        self.controller = Controller(rules, FewPrompts(**stream), self.members, healing=healing)
        self.now = 0.0
        self.first = self.hear(Serving(tuple(workers)))

    def hear(self, event: Event) -> list[Command]:
        return self.controller.handle(event, self.now)

    def take(self) -> tuple[Taken | None, list[Command]]:
        return self.controller.take(self.now)

    def taken(self) -> list[str] | None:
        """Uids of the step that can be taken; None: none can."""
        found = self.take()[0]
        return None if found is None else [uid for uid, _ in found.attempts]

    def answer(self, key: str, version: int = 0, lengths: Sequence[int] = (3, 4)) -> list[Command]:
        """Its worker has sampled it, all with one version."""
        return self.hear(Answered(key, head_of(key, lengths, version), Handle(key)))

    def finish(self, key: str, scores: Sequence[float] = (0.0, 1.0), version: int = 0) -> list[Command]:
        """It is sampled, kept and scored."""
        self.answer(key, version, [3] * len(scores))
        self.hear(Kept(key))
        return self.hear(Scored("s", key, scores_of(scores)))

    def refuse(self, key: str) -> list[Command]:
        return self.hear(Unanswered(key, DroppedPrompt(key.split("/", 1)[1], "prompt_too_long", "9 tokens")))

    def publish(self, version: int) -> list[Command]:
        return self.hear(Published(version))


def head_of(key: str, lengths: Sequence[int], version: int) -> GroupHead:
    sampled = np.array(lengths)
    reasons = ("stop",) * len(lengths)
    return GroupHead(key, sampled + 2, sampled, sampled, reasons, version, version, version, float(version))


def scores_of(total: Sequence[float]) -> Scores:
    bad = tuple(NonFinite("", i, {"r": x}, "") for i, x in enumerate(total) if not math.isfinite(x))
    count = len(total)
    return Scores(np.array(total, np.float32), {}, np.ones(count, np.float32), np.arange(count, dtype=np.uint64), bad)


def compared(key: str, n: int = 2) -> Compared:
    zeros = np.zeros(n, np.float32)
    return Compared("r", key, Referenced(ReferenceHead(zeros, zeros), Handle(f"logprobs of {key}")))


def compared_and_kept(key: str, n: int = 2) -> tuple[Compared, ReferenceKept]:
    """A reference server has answered, and the collator has the logprobs."""
    return compared(key, n), ReferenceKept(key)


def of_kind(commands: Iterable[Command], kind: type[CommandT]) -> list[CommandT]:
    return [command for command in commands if isinstance(command, kind)]


def given(commands: Iterable[Command]) -> list[tuple[str, str]]:
    """(worker, key) of every request that is submitted."""
    return [(one.worker, request.key) for one in of_kind(commands, Submit) for request in one.requests]


def dropped(commands: Iterable[Command]) -> list[tuple[str, str]]:
    """(uid, reason)."""
    books = [book for book in of_kind(commands, Book) if book.state == "dropped"]
    return [(uid, book.reason) for book in books for uid, _ in book.attempts]


def issued(commands: Iterable[Command]) -> list[tuple[str, int]]:
    """(uid, attempt)."""
    return [one for book in of_kind(commands, Book) if book.state == "issued" for one in book.attempts]
