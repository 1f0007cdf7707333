"""What is known of a rollout worker from the pushes so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray

from rlhf_dist.cluster.waits import fetch
from rlhf_dist.errors import ActorLost, EngineBroken, RayLost, RlhfError
from rlhf_dist.rollout.worker import BEAT_S
from rlhf_dist.weights.receipts import Announcement

BEATS = 32
"""Of all workers together, at most in `BEAT_S`."""


@dataclass(slots=True)
class Standing:
    """Of one worker."""

    worker: Any
    call: Any = None
    """Its answer to a push, while that is not read."""
    version: int = -1
    """The version of that push."""
    offset: int = 0
    """The buffer of that version: a worker that loads holds it."""
    missed: int = 0
    """Pushes in a row without a right receipt."""
    last_missed: int = -1
    """The version of the last one; each counts once."""
    problem: str = ""
    """What was wrong then."""
    silent: bool = False
    """It did not answer in time, and nobody waits for it until it has proved a version."""
    returned: bool = False
    """It was started again, and has proved no version since."""
    posted: int = 0
    """Messages sent to it."""
    proved: Announcement | None = None
    """The newest one that its receipt was right for."""

    @property
    def is_coming(self) -> bool:
        """Whether it was started again, and has not answered to its first load yet."""
        return self.returned and (self.call is not None or self.version < 0)

    def ask_to_load(self, announcement: Announcement) -> None:
        """Unless it is still busy with an earlier one."""
        if self.call is None:
            self.call = self.worker.load_weights.remote(announcement)
            self.version, self.offset = announcement.version, announcement.offset

    def begin_anew(self, name: str) -> str:
        """Another learner will push, perhaps the same version with other weights; what was pushed before is read now.

        A load that still goes on is read at the next push. Returns why the worker `name` cannot be used any more.
        """
        self.version, self.last_missed = -1, -1
        if self.call is None:
            return ""
        self.proved = None
        if not is_done(self.call):
            return ""
        call, self.call = self.call, None
        try:
            fetch(call, name, "load_weights", 0.0)
        except RayLost:
            raise
        except ActorLost as error:
            return str(error)
        except EngineBroken as error:
            return f"{name}: {error}"
        except RlhfError:
            pass  # It has the weights that it had.
        return ""


def is_done(call: Any) -> bool:
    """Whether the answer is there."""
    return bool(ray.wait([call], num_returns=1, timeout=0)[0])


def beat_s(workers: int) -> float:
    """The longest that one of so many workers keeps its steps to itself."""
    return BEAT_S * max(1.0, workers / BEATS)
