"""When in a run something happens. Pure."""

from __future__ import annotations


def due(every: int, step: int, steps: int) -> bool:
    """Whether something that happens every so many steps (0: never), and at the end, happens at this one."""
    return step == steps or bool(every and step % every == 0)
