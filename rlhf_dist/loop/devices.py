"""What devices did in a step: goodput by cause, and each engine's speed and load.

Of engines the mean stands beside the largest and the smallest, so that one sick engine shows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rlhf_dist.loop.members import Members
from rlhf_dist.telemetry.goodput import Goodput
from rlhf_dist.types import Beat

NOTHING = Beat("", 0)


class Devices:
    """Both, of the processes of a run."""

    def __init__(self, members: Members) -> None:
        self._members = members
        self._loads = EngineLoads()
        self.goodput = Goodput(lambda: members.side)

    def lap(self) -> dict[str, float]:
        """The metrics of a step; those of engines since the last call, evaluations included."""
        return self.goodput.lap() | self._loads.metrics(self._members.beats)


class EngineLoads:
    """Differences of what engines count from their start."""

    def __init__(self) -> None:
        self._before: Mapping[str, Beat] = {}

    def metrics(self, beats: Mapping[str, Beat]) -> dict[str, float]:
        """Of the time since the last call, from the last beat of each engine; nothing where there is no engine.

        An engine that made no decoding step counts as 0 in all of them: it had no work, or is stuck.
        """
        found: dict[str, list[float]] = {}
        for name, beat in beats.items():
            before = self._before.get(name, NOTHING)
            if beat.steps < before.steps:  # another process of the same name
                before = NOTHING
            for kind, value in since(before, beat).items():
                found.setdefault(kind, []).append(value)
        self._before = dict(beats)
        return {
            f"rollout/engine_{kind}_{which}": float(of(values))
            for kind, values in found.items()
            for which, of in (("mean", np.mean), ("max", np.max), ("min", np.min))
        }


def since(before: Beat, now: Beat) -> dict[str, float]:
    """Tokens per second of decoding, responses under way and used share of the cache, means over decoding steps."""
    steps = now.steps - before.steps
    if steps <= 0:
        return {"tokens_per_s": 0.0, "running": 0.0, "kv_use": 0.0}
    work = now.work.less(before.work)
    speed = work.tokens / work.busy_s if work.busy_s > 0 else 0.0
    return {"tokens_per_s": speed, "running": work.tokens / steps, "kv_use": work.kv_use / steps}
