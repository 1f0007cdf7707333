"""Mistakes that are made in the product on purpose, and the first seed that finds each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.plan import plan_of
from chaos.search import Found, search

MOST_SEEDS = 400


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something wrong in the product, and the rules that it breaks."""

    make: Callable[[pytest.MonkeyPatch], object]
    rules: Sequence[str]
    faults: int = 0
    """That the smallest plan has, at most."""


def first_that_fails() -> Found:
    for seed in range(MOST_SEEDS):
        found = search(plan_of(seed))
        if found.broken is not None:
            return found
    raise AssertionError(f"none of {MOST_SEEDS} seeds fails")
