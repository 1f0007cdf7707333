"""What many seeds come to, in one process or in several."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch

from chaos.plan import plan_of
from chaos.search import Found, search


@dataclass(slots=True)
class Totals:
    """Of many seeds."""

    seeds: int = 0
    lives: int = 0
    steps: int = 0
    calls: int = 0
    writes: int = 0
    virtual_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    broken: dict[int, str] = field(default_factory=dict)
    """Seed -> the rule that does not hold."""

    @staticmethod
    def of(found: Found) -> Totals:
        """Of one."""
        broken = {} if found.broken is None else {found.plan.seed: str(found.broken)}
        counts = found.lives, found.steps, found.calls, found.writes, found.seconds
        return Totals(1, *counts, found.kinds, found.seen, found.endings, broken)

    def merge(self, other: Totals) -> None:
        """Count another's."""
        for name in ("seeds", "lives", "steps", "calls", "writes", "virtual_s"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults.update(other.faults)
        self.seen.update(other.seen)
        self.endings.update(other.endings)
        self.broken |= other.broken


@cache
def _settle() -> None:
    """Once in a process."""
    gc.freeze()


def search_all(seeds: Sequence[int]) -> Totals:
    """In the process that calls it. Its threads are set to one, and what it has imported is taken for what stays."""
    torch.set_num_threads(1)
    _settle()
    totals = Totals()
    for seed in seeds:
        totals.merge(Totals.of(search(plan_of(seed))))
    return totals
