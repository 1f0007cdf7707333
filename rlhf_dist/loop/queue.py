"""The queue between the actor side, which makes experiences, and the learner side, which uses them.

With L = max_policy_lag and G groups a step, a group issued while k others are under way is used k // G steps later,
so at most (L + 1) * G groups are under way at once:

    | who is slow     | what fills up            | what stops           | what goes on                     |
    |-----------------|--------------------------|----------------------|----------------------------------|
    | rollout workers | nothing                  | learner, in `take`   | generation                       |
    | learner         | the queue, (L + 1) * G   | issuing of prompts   | rollouts and scores already out  |
    | a single worker | its seats stay taken     | issuing, by as many  | learner; the late ones may be stale |
    | L = 0           | G seats, one step's      | each side in turn    | the synchronous loop             |

An experience is stale when learner_version - oldest_version > L. A stale one has no seat: it comes out of `take`
apart, to be dropped with reason `stale`, and may be made up for by another prompt.
Pure bookkeeping: no waiting, no processes, no tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from rlhf_dist.types import Experience


class ExperienceQueue:
    """First in, first out, bounded by policy lag. Used by one thread."""

    def __init__(self, max_lag: int, groups_per_step: int) -> None:
        """`max_lag`: published versions by which an experience may be behind; 0 is the synchronous loop."""
        assert max_lag >= 0 and groups_per_step >= 1, (max_lag, groups_per_step)
        self._max_lag = max_lag
        self._seats = (max_lag + 1) * groups_per_step
        self._in_flight = 0
        self._waiting: deque[Experience] = deque()

    @property
    def in_flight(self) -> int:
        """Groups issued and neither put nor dropped."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """Experiences that the learner has not taken, stale ones included."""
        return len(self._waiting)

    def may_issue(self, learner_version: int) -> int:
        """How many more groups may be issued now; 0: wait for the learner."""
        fresh = sum(not self._is_stale(experience, learner_version) for experience in self._waiting)
        return max(0, self._seats - self._in_flight - fresh)

    def issued(self, count: int) -> None:
        """`count` groups went to the rollout workers."""
        self._in_flight += count

    def dropped(self, count: int) -> None:
        """`count` groups in flight gave no experience (prompt too long, worker lost): their seats are free."""
        assert 0 <= count <= self._in_flight, (count, self._in_flight)
        self._in_flight -= count

    def put(self, experiences: Iterable[Experience]) -> None:
        """Scored groups arrive; each was in flight."""
        arrived = list(experiences)
        assert len(arrived) <= self._in_flight, f"{len(arrived)} experiences for {self._in_flight} groups in flight"
        self._in_flight -= len(arrived)
        self._waiting.extend(arrived)

    def take(self, count: int, learner_version: int) -> tuple[tuple[Experience, ...], tuple[Experience, ...]]:
        """(experiences, stale): `count` fresh experiences, oldest first, or none while fewer are there.

        Every stale experience leaves the queue too and is returned apart, whether or not there were enough.
        """
        assert count >= 1, count
        stale = tuple(e for e in self._waiting if self._is_stale(e, learner_version))
        fresh = [e for e in self._waiting if not self._is_stale(e, learner_version)]
        taken = tuple(fresh[:count]) if len(fresh) >= count else ()
        self._waiting = deque(fresh[len(taken) :])
        return taken, stale

    def _is_stale(self, experience: Experience, learner_version: int) -> bool:
        return learner_version - experience.head.oldest_version > self._max_lag
