"""Goodput by cause: every second of every device is booked once, to what it did or what it waited for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

OTHER = "wait_other"
RECOVER = "recover"
"""Phase in which ranks that were lost are started again: who has nothing else to do is booked to it. Steps without such
a phase have no share of it."""
IDLE_WORKER = {"train": "wait_train", "value": "wait_value", "sync": "sync", RECOVER: RECOVER}
"""Phase of the learner side -> what a rollout worker without requests is booked to. A push is its own business, too. In
any other phase it waits for scores, slower workers or something else."""
ROLLOUT_CAUSES = ("generate", "sync", "wait_train", "wait_slowest", "wait_score", OTHER)
LEARNER_CAUSES = ("train", "sync", "wait_generate", "wait_score", OTHER)
SCORING_CAUSES = ("score", "wait_generate", "wait_learner", OTHER)
"""What every step has a share of."""
WITH_CRITIC = {"rollout": ("wait_value",), "learner": ("value",)}
"""Side -> what it has a share of in steps with a phase `value`, too."""
LEARNER = {"train": "train", "value": "value", "sync": "sync", RECOVER: RECOVER}
"""Phase of the learner side -> what its devices are booked to; in any other they wait."""


@dataclass(frozen=True, slots=True)
class ActorSide:
    """What the actor side does at a moment."""

    generating: int
    """Rollout workers that have requests."""
    idle: int
    """Those that have none."""
    scoring: int
    """Scoring and reference servers that have work."""
    waiting: int = 0
    """Those that have none."""


class Goodput:
    """Books device-seconds of all sides. `look` has to come before every change of a state, or of the phase.

    What is not told of between two looks counts as it was found at the second: an error of one event.
    """

    def __init__(self, actors: Callable[[], ActorSide], clock: Callable[[], float] = time.perf_counter) -> None:
        self._actors = actors
        self._clock = clock
        self._looked = clock()
        self._phase = ""
        self._rollout: dict[str, float] = defaultdict(float)
        self._learner: dict[str, float] = defaultdict(float)
        self._scoring: dict[str, float] = defaultdict(float)

    def phase(self, name: str) -> None:
        """The learner side begins something else; empty: nothing that has a name."""
        self.look()
        self._phase = name

    def look(self) -> None:
        """Book the time since the last look."""
        now = self._clock()
        seconds, self._looked = now - self._looked, now
        side = self._actors()
        self._rollout["generate"] += seconds * side.generating
        self._rollout[idle_worker(self._phase, side)] += seconds * side.idle
        self._learner[learner(self._phase, side)] += seconds
        self._scoring["score"] += seconds * side.scoring
        self._scoring[idle_server(self._phase, side)] += seconds * side.waiting

    def lap(self) -> dict[str, float]:
        """End the step: `goodput/SIDE_CAUSE` for `rollout`, `learner` and `scoring`; a side's shares sum to 1."""
        self.look()
        found = shares("goodput/rollout_", self._rollout, ROLLOUT_CAUSES)
        found |= shares("goodput/learner_", self._learner, LEARNER_CAUSES)
        found |= shares("goodput/scoring_", self._scoring, SCORING_CAUSES)
        self._scoring.clear()
        self._rollout.clear()
        self._learner.clear()
        return found


def idle_worker(phase: str, side: ActorSide) -> str:
    """What a rollout worker without requests does or waits for."""
    if phase in IDLE_WORKER:
        return IDLE_WORKER[phase]
    if side.generating:
        return "wait_slowest"
    return "wait_score" if side.scoring else OTHER


def idle_server(phase: str, side: ActorSide) -> str:
    """What a scoring or reference server without work waits for."""
    if phase == RECOVER:
        return RECOVER
    if side.generating:
        return "wait_generate"
    return "wait_learner" if phase in LEARNER else OTHER


def learner(phase: str, side: ActorSide) -> str:
    """What the learner's devices do or wait for."""
    if phase in LEARNER:
        return LEARNER[phase]
    if phase and side.generating:
        return "wait_generate"
    return "wait_score" if phase and side.scoring else OTHER


def shares(prefix: str, booked: Mapping[str, float], causes: Sequence[str]) -> dict[str, float]:
    """Of all that is booked; nothing where that is nothing."""
    total = sum(booked.values())
    return (
        {prefix + cause: booked.get(cause, 0.0) / total for cause in dict.fromkeys((*causes, *booked))}
        if total > 0
        else {}
    )
