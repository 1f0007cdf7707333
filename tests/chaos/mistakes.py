"""Mistakes that are made in the product on purpose, and the first seed that finds each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import chaos.life
from chaos.plan import plan_of
from chaos.search import Found, search, uncut

MOST_SEEDS = 400


@dataclass(frozen=True, slots=True)
class Mistake:
    """Something wrong in the product, and the rules that it breaks."""

    make: Callable[[pytest.MonkeyPatch], object]
    rules: Sequence[str]
    faults: int = 0
    """That the smallest plan has, at most."""


@contextmanager
def made(mistake: Mistake, account: bool = True) -> Iterator[None]:
    """The product has it in the block. What an undisturbed run comes to is remembered, and is another in there.

    `account`: with the second account of the controller, which finds most mistakes before anything comes of them.
    """
    uncut.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            if not account:
                patch.setattr(chaos.life, "all_watched", nullcontext)
            mistake.make(patch)
            yield
    finally:
        uncut.cache_clear()


def first_that_fails() -> Found:
    for seed in range(MOST_SEEDS):
        found = search(plan_of(seed))
        if found.broken is not None:
            return found
    raise AssertionError(f"none of {MOST_SEEDS} seeds fails")
