"""How far labellers agree with each other: Krippendorff's alpha, by the library `krippendorff`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from rlhf_dist.labels.verdicts import BOTH_BAD, SKIP, TIE, Judge, Verdict

INSTALL = "krippendorff==0.9.0"
LEVELS = {"pair": "nominal", "ranking": "nominal", "stars": "ordinal", "thumbs": "nominal"}
"""A ranking counts as its pairs: which of two is before the other."""
OF_A_PAIR = {TIE: 2, BOTH_BAD: 3}


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one kind of judgement."""

    alpha: float | None
    """1: all agree; 0: as by chance; None where that says nothing."""
    units: int
    """What at least two labellers judged; of a ranking each pair is one."""
    why: str
    """Why there is no alpha, or empty."""


def agreement(judge: Judge, said: Iterable[tuple[int, str, Verdict]]) -> Agreement:
    """said: (item, labeller, what was decided), no labeller twice about an item. Skipped ones do not count."""
    units: defaultdict[tuple[int, ...], dict[str, int]] = defaultdict(dict)
    for item, labeller, verdict in said:
        if verdict != SKIP:
            for unit, value in _values(item, verdict):
                units[unit][labeller] = value
    shared = [values for values in units.values() if len(values) > 1]
    if not shared:
        return Agreement(None, 0, "no item has been judged by two labellers")
    labellers = {name: row for row, name in enumerate(sorted({name for values in shared for name in values}))}
    table = np.full((len(labellers), len(shared)), math.nan)
    for column, values in enumerate(shared):
        for name, value in values.items():
            table[labellers[name], column] = value
    if len(np.unique(table[~np.isnan(table)])) < 2:
        return Agreement(None, len(shared), "all decisions are the same, so chance would agree as well")
    try:
        import krippendorff
    except ImportError:
        return Agreement(None, len(shared), f"the package krippendorff is missing: `pip install {INSTALL}`")
    alpha = krippendorff.alpha(reliability_data=table, level_of_measurement=LEVELS[judge])  # pyright: ignore[reportArgumentType]
    return Agreement(float(alpha), len(shared), "")


def _values(item: int, verdict: Verdict) -> Iterable[tuple[tuple[int, ...], int]]:
    if isinstance(verdict, list):
        for first, second in combinations(sorted(verdict), 2):
            yield (item, first, second), int(verdict.index(first) < verdict.index(second))
    else:
        yield (item,), OF_A_PAIR[verdict] if isinstance(verdict, str) else int(verdict)
