"""What the owner sees: how far the work is, who works how, whether they agree, which model wins. Only reads."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any, TypeVar

from rlhf_dist.labels.decisions import Vote, votes
from rlhf_dist.labels.rater_agreement import agreement
from rlhf_dist.labels.store import LabelStore
from rlhf_dist.labels.verdicts import BOTH_BAD, JUDGES, SKIP, TIE, Judge, Verdict, is_right

AnyVote = TypeVar("AnyVote", bound=Vote)
GOLD_SHARE, GOLD_LEAST = 0.7, 5
"""A labeller with fewer gold items right, of at least so many, is marked."""
COMMENTS = 50
Z = 1.959964
"""Of a 95% interval."""


def overview(store: LabelStore) -> dict[str, Any]:
    """All facts, as JSON has them. Raises DiskError."""
    with store.reading() as db:
        made = list(votes(db))
        kinds = dict(db.execute("SELECT judge, COUNT(*) FROM items GROUP BY judge").fetchall())
        totals = db.execute("SELECT * FROM totals").fetchone()
        late, undone, lent, left = (
            db.execute(f"SELECT {what}").fetchone()[0]
            for what in (
                "COUNT(*) FROM votes WHERE late",
                "COUNT(*) FROM undone",
                "COUNT(*) FROM leases WHERE live",
                "TOTAL(open) FROM items",
            )
        )
    counted = [one for one in made if one.gold is None]
    return {
        "items": {kind: kinds[kind] for kind in JUDGES if kind in kinds},
        "gold_items": totals["golds"],
        "decisions": len(made),
        "skipped": sum(one.verdict == SKIP for one in made),
        "late": late,
        "taken_back": undone,
        "lent": lent,
        "places_left": int(left),
        "flags": dict(Counter(flag for one in made for flag in one.flags)),
        "agreement": agreements(counted),
        "labellers": [labeller_facts(name, mine) for name, mine in sorted(by_labeller(made).items())],
        "models": model_facts(counted),
        "pairs": pair_facts(counted),
        "comments": [
            {"labeller": one.labeller, "item": one.item, "text": one.comment}
            for one in sorted(made, key=lambda one: -one.at)
            if one.comment
        ][:COMMENTS],
    }


def by_labeller(made: Sequence[AnyVote]) -> dict[str, list[AnyVote]]:
    """The decisions of each."""
    found: defaultdict[str, list[AnyVote]] = defaultdict(list)
    for one in made:
        found[one.labeller].append(one)
    return found


def agreements(made: Sequence[Vote]) -> dict[str, dict[str, Any]]:
    """Of each kind of judgement that somebody made."""
    kinds: dict[Judge, None] = dict.fromkeys(one.judge for one in made)
    return {
        kind: asdict(agreement(kind, [(one.item, one.labeller, one.verdict) for one in made if one.judge == kind]))
        for kind in kinds
    }


def labeller_facts(name: str, mine: Sequence[Vote]) -> dict[str, Any]:
    """Speed, sides and gold of one labeller. `left`: how often the left side won, of all pairs that a side won."""
    right, asked = gold_score(mine)
    sides = [one for one in mine if one.judge == "pair" and isinstance(one.verdict, int)]
    left = sum(one.shown[0] == one.verdict for one in sides)
    return {
        "name": name,
        "decisions": len(mine),
        "skipped": sum(one.verdict == SKIP for one in mine),
        "ties": sum(one.verdict in (TIE, BOTH_BAD) for one in mine if one.judge == "pair"),
        "median_s": statistics.median(one.seconds for one in mine),
        "left": left,
        "sides": len(sides),
        "gold_right": right,
        "gold_asked": asked,
        "careless": asked >= GOLD_LEAST and right < GOLD_SHARE * asked,
    }


def gold_score(mine: Sequence[Vote]) -> tuple[int, int]:
    """(right, asked) of gold items that were not skipped."""
    right = [is_right(one.judge, one.gold, one.verdict) for one in mine if one.gold is not None and one.verdict != SKIP]
    return sum(right), len(right)


def met(one: Vote) -> list[tuple[int, int, Verdict]]:
    """(a, b, a | b | TIE | BOTH_BAD) for each two responses that a decision compares."""
    if isinstance(one.verdict, list):
        return [(a, b, a) for a, b in combinations(one.verdict, 2)]
    return [] if one.verdict == SKIP or one.judge != "pair" else [(0, 1, one.verdict)]


def pair_facts(made: Sequence[Vote]) -> list[dict[str, Any]]:
    """For each two models: who won how often. `first` is the one that comes first by name."""
    found: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for one in made:
        for a, b, winner in met(one):
            first, second = sorted((one.models[a], one.models[b]))
            if first == second or not first:
                continue
            who = one.models[winner] if isinstance(winner, int) else str(winner)
            found[first, second]["wins" if who == first else "losses" if who == second else who] += 1
    return [
        {"first": first, "second": second} | {key: counts[key] for key in ("wins", "losses", TIE, BOTH_BAD)}
        for (first, second), counts in sorted(found.items())
    ]


def model_facts(made: Sequence[Vote]) -> list[dict[str, Any]]:
    """For each model: share of comparisons won against others, ties as half, with its interval; stars; thumbs."""
    points: defaultdict[str, list[float]] = defaultdict(list)
    stars: defaultdict[str, list[int]] = defaultdict(list)
    thumbs: defaultdict[str, list[int]] = defaultdict(list)
    for one in made:
        for a, b, winner in met(one):
            if one.models[a] != one.models[b]:
                points[one.models[a]].append(0.5 if isinstance(winner, str) else float(winner == a))
                points[one.models[b]].append(0.5 if isinstance(winner, str) else float(winner == b))
        if one.judge in ("stars", "thumbs") and isinstance(one.verdict, int):
            (stars if one.judge == "stars" else thumbs)[one.models[0]].append(int(one.verdict))
    names = sorted({name for table in (points, stars, thumbs) for name in table if name})
    return [
        {"name": name, "compared": len(points[name])}
        | ({"won": share(points[name])} if points[name] else {})
        | ({"stars": statistics.fmean(stars[name]), "rated": len(stars[name])} if stars[name] else {})
        | ({"up": share(thumbs[name]), "thumbs": len(thumbs[name])} if thumbs[name] else {})
        for name in names
    ]


def share(points: Sequence[float]) -> Mapping[str, float]:
    """The mean of values from 0 to 1 with Wilson's 95% interval."""
    n, mean = len(points), statistics.fmean(points)
    middle = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    return {"mean": mean, "low": max(0.0, middle - half), "high": min(1.0, middle + half)}
