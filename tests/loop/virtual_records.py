"""What the second account of a run in virtual time is written in."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_dist.types import GroupHead, Request

Attempt = tuple[str, int]
Purpose = tuple[str, str]
"""(purpose, uid) of a request, whatever its attempt."""


class Broken(AssertionError):
    """A rule does not hold."""


@dataclass(slots=True)
class Entry:
    """A request that a worker was given, until nothing more is wanted of it."""

    request: Request
    worker: str
    head: GroupHead | None = None
    kept: bool = False
    scored: bool = False
    compared: bool = False
    ready: bool = False
    """It was whole before."""
    undone: bool = False
    """A server could not get at it."""
    asked: bool = False
    """Its worker was asked to hand it over."""

    @property
    def may_leave(self) -> bool:
        return self.head is None and self.request.purpose in ("train", "baseline")


@dataclass(slots=True)
class Line:
    """An attempt in the ledger."""

    state: str
    reason: str = ""
    tokens: int = 0
    trained: int = 0
