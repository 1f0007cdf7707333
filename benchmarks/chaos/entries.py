"""What the second account of a controller is written in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from chaos.clock import Broken
from chaos.truth import Truth
from rlhf_dist.types import GroupHead, Request

Attempt = tuple[str, int]
Purpose = tuple[str, str]
"""(purpose, uid) of a request, whatever its attempt."""


def wrong(text: str) -> Broken:
    """What the controller says does not follow from what it heard."""
    return Broken("account", text)


def hopeless(truth: Truth) -> bool:
    """No response has a reward."""
    return bool(np.isnan(truth.scores.total).all())


def flat(truth: Truth) -> bool:
    """All responses that have a reward have the same."""
    total = truth.scores.total
    return len(set(total[~np.isnan(total)].tolist())) == 1


@dataclass(slots=True)
class Entry:
    """A request that a worker was given, until nothing more is wanted of it."""

    request: Request
    worker: str
    truth: Truth
    head: GroupHead | None = None
    kept: bool = False
    scored: bool = False
    compared: bool = False
    reference_kept: bool = False
    ready: bool = False
    """It was whole before."""
    undone: bool = False
    """A server could not get at it."""
    asked: bool = False
    """Its worker was asked to hand it over."""
    copied: bool = False
    """The collator has a copy of what there is."""
    recalled: bool = False
    """Its worker is lost, and the collator is to give the copy away."""
    orphaned: bool = False
    """Its worker was lost; another may have the name by now."""

    @property
    def may_leave(self) -> bool:
        """Whether its worker may be asked for it."""
        return self.head is None and not self.recalled and self.request.purpose in ("train", "baseline")
