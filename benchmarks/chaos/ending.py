"""A run that is told to end: at a time, and as `cluster.signals.Saving` tells it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from chaos.world import World
from rlhf_dist.errors import RlhfError


class Ended(Exception):
    """The run ended because it was told to."""


class Ending:
    """`ports.Stop`."""

    def __init__(self, world: World, limit_s: float) -> None:
        """`limit_s`: `faults.save_on_stop_s`."""
        self._world, self._limit_s = world, limit_s
        self.note = ""
        """What was saved, or why nothing was."""
        self._come = self._inside = False
        self._until = 0.0
        world.plan_strikes("end", [""], lambda _: self._told_to_end())

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """See `ports.Stop`."""
        self._inside = True
        try:
            yield
        except RlhfError as error:
            if not self._come:
                raise
            self.tell(f"it failed before it could save: {error}")
            raise KeyboardInterrupt from error
        finally:
            self._inside = False

    def asked(self) -> bool:
        """See `ports.Stop`."""
        return self._come

    def left_s(self) -> float:
        """See `ports.Stop`."""
        return max(0.0, self._until - self._world.clock.now)

    def tell(self, note: str) -> None:
        """See `ports.Stop`."""
        self.note = note

    def _told_to_end(self) -> None:
        self._come, self._until = True, self._world.clock.now + self._limit_s
        if not self._inside:
            raise KeyboardInterrupt
        self._world.clock.after(self._limit_s, self._too_late, background=True)

    def _too_late(self) -> None:
        if not self.note and self._inside:
            self.tell("it took too long")
            raise KeyboardInterrupt
