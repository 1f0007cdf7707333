"""What the loop asks of the processes around it; `cluster` has the Ray side, tests may have another.

The actor side is asked and does not answer: what comes of it arrives as events. The learner side answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rlhf_dist.learner.numbers_check import RankFault
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import AS_THEY_ARE, Estimate, EstimateSums, Whitening
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.events import Event
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group, Handle, Request
from rlhf_dist.weights.receipts import Announcement


class Stop(Protocol):
    """Who tells a run to end early. `AT_ONCE` never does: a run that cannot save is interrupted where it is."""

    def deferred(self) -> AbstractContextManager[None]:
        """In the block a signal that ends the command interrupts nothing until its limit: the run has to ask for it.

        What fails after it counts as the end that was asked for: raises KeyboardInterrupt.
        """
        ...

    def asked(self) -> bool:
        """Whether the run is to save its last step and end."""
        ...

    def left_s(self) -> float:
        """Seconds that the end which was asked for may still take; 0: none, or it was not asked for."""
        ...

    def tell(self, note: str) -> None:
        """What was saved, or why nothing was, for the last message of the command."""
        ...


class _AtOnce:
    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def asked(self) -> bool:
        return False

    def left_s(self) -> float:
        return 0.0

    def tell(self, note: str) -> None:
        """Nobody asks."""


AT_ONCE: Stop = _AtOnce()


class Arrivals(Protocol):
    """The inbox: events in the order in which they came."""

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        """Hand events to `listener` from now on: in `pump`, and while anybody waits for an answer."""
        ...

    def pump(self) -> None:
        """Wait for events, for a moment at most, and hand them over. Raises `RayLost`."""
        ...

    def now(self) -> float:
        """Seconds, from any start; a time in which this process itself was stopped does not count."""
        ...


class Processes(Protocol):
    """All processes of the run."""

    def respawn(self, member: str) -> None:
        """End a process, if anything is left of it, and start it again. `Returned` or `NotStarted` comes of it."""
        ...


class Ranks(Protocol):
    """All ranks of the learner and the critic."""

    def rebuild(self, folder: Path | None) -> list[str]:
        """End them all and start them again, with what lies in a checkpoint's folder; None: as the run began.

        Returns once they have met, with what was wrong with rollout workers meanwhile, a sentence each. Raises
        `RanksLost` or `RanksSilent` where one is lost again.
        """
        ...


class Rollouts(Protocol):
    """The rollout fleet."""

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        """Have a worker sample these. `Answered` or `Unanswered` comes of each."""
        ...

    def cancel(self, worker: str, keys: Sequence[str]) -> None:
        """Let a worker end these."""
        ...

    def hand_over(self, worker: str, keys: Sequence[str]) -> None:
        """Have a worker stop these. `Partial` comes of each, unless its answer is on its way."""
        ...

    def sleep(self) -> list[str]:
        """Before the learner works on devices that it shares with the workers: let them give its memory back.

        Nothing is under way. Returns once all have; one that does not in time, or fails, is given up: a sentence for
        each. Raises `RunError` when none is left.
        """
        ...

    def serving(self) -> tuple[str, ...]:
        """The workers that proved the published version; those that have come back are asked to load it."""
        ...


class Scoring(Protocol):
    """The scoring fleet."""

    def submit(self, server: str, key: str, body: Handle[Group]) -> None:
        """Have a server score a group. `Scored` comes of it, or the reward's error is raised."""
        ...


class References(Protocol):
    """The reference servers."""

    def submit(self, server: str, key: str, body: Handle[Group], temperature: float) -> None:
        """Have a server compute a group's reference logprobs. `Compared` comes of it."""
        ...

    def update(self, announcement: Announcement, keep: float) -> None:
        """Move the reference to published weights, keeping the share `keep` of its own."""
        ...

    def save(self, folder: Path) -> None:
        """Into a checkpoint, where it moves."""
        ...


class Bodies(Protocol):
    """The collator."""

    def keep(self, bodies: Mapping[str, Handle[Group]]) -> None:
        """Take the tokens of groups over, by key. `Kept` comes of each."""
        ...

    def keep_references(self, logprobs: Mapping[str, Handle[np.ndarray]]) -> None:
        """Take the reference logprobs of groups over, by key. `ReferenceKept` comes of each."""
        ...

    def keep_copy(self, key: str, body: Handle[Group]) -> None:
        """Keep what there is of a group that is being sampled, in place of an earlier copy."""
        ...

    def recall(self, key: str) -> None:
        """A group's worker is lost: give the last copy away. `Partial` comes of it, or `PartialLost`."""
        ...

    def forget(self, keys: Sequence[str]) -> None:
        """These groups are not needed any more."""
        ...

    def forget_all(self) -> None:
        """Nor is any group that was handed over before."""
        ...

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """Each group's samples, to be read by people: the response, or all turns of a conversation."""
        ...

    def batches(self, shards: Sequence[Shard], keys: Sequence[str], compared: bool) -> Sequence[Handle[RankBatch]]:
        """What each rank trains on in a step of these groups; `compared`: with the reference's logprobs."""
        ...

    def save_step(
        self,
        path: Path,
        shards: Sequence[Shard],
        keys: Sequence[str],
        compared: bool,
        estimates: Estimates,
        facts: Mapping[str, Any],
    ) -> None:
        """Write the same, with the credit by token and facts about the step, into a file. Raises DiskError."""
        ...


@dataclass(frozen=True, slots=True)
class Estimates:
    """Credit by token of a step, rank by rank; the arrays stay where they were made."""

    handles: Sequence[Handle[Estimate]]
    """One a rank; none where credit is by response."""
    whitening: Whitening
    metrics: Mapping[str, float]


NO_ESTIMATES = Estimates((), AS_THEY_ARE, {})
"""For algorithms whose credit is by response."""

Batches = Sequence[Handle[RankBatch]]
"""One for each rank."""


class Policy(Protocol):
    """The learner's ranks."""

    ranks: int

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        """Learn from a step; the ranks' metrics, merged."""
        ...

    def witnessed(self) -> Sequence[Seen]:
        """What the optimizer took in the last update, by rank; with `loop.witness`."""
        ...

    def faults(self) -> Mapping[str, RankFault]:
        """Why the last update ended with `names.FAULT`: what each rank found, by name, of those that know."""
        ...

    def save(self, folder: Path) -> None: ...


class Critic(Protocol):
    """The critic's ranks, as many as the policy's."""

    def estimate(self, batches: Batches) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        """Values and credit of each batch under the present critic."""
        ...

    def begin_update(self, batches: Batches, estimates: Estimates) -> Handle[MetricSums]:
        """Begin to learn the returns, beside what the policy does."""
        ...

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        """Wait for `begin_update`; the ranks' metrics, merged."""
        ...

    def faults(self) -> Mapping[str, RankFault]:
        """As `Policy.faults`, of an update that ended with `names.CRITIC_FAULT`."""
        ...

    def save(self, folder: Path) -> None: ...
