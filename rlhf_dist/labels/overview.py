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
ByItem = defaultdict[int, list[float]]
"""Item -> from 0 to 1, what each of its decisions or pairs gave a model."""
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
        comments = db.execute(
            "SELECT labeller, item, comment AS text FROM standing WHERE comment != ''"
            " ORDER BY at DESC, id DESC LIMIT ?",
            (COMMENTS,),
        ).fetchall()
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
        "comments": [dict(row) for row in comments],
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
    points: defaultdict[str, ByItem] = defaultdict(lambda: defaultdict(list))
    stars: defaultdict[str, list[int]] = defaultdict(list)
    thumbs: defaultdict[str, ByItem] = defaultdict(lambda: defaultdict(list))
    for one in made:
        for a, b, winner in met(one):
            if one.models[a] != one.models[b]:
                points[one.models[a]][one.item].append(0.5 if isinstance(winner, str) else float(winner == a))
                points[one.models[b]][one.item].append(0.5 if isinstance(winner, str) else float(winner == b))
        if one.judge == "stars" and isinstance(one.verdict, int):
            stars[one.models[0]].append(int(one.verdict))
        if one.judge == "thumbs" and isinstance(one.verdict, bool):
            thumbs[one.models[0]][one.item].append(float(one.verdict))
    names = sorted({name for table in (points, stars, thumbs) for name in table if name})
    return [
        {"name": name, "compared": sum(map(len, points[name].values()))}
        | ({"won": share(points[name])} if points[name] else {})
        | ({"stars": statistics.fmean(stars[name]), "rated": len(stars[name])} if stars[name] else {})
        | ({"up": share(thumbs[name]), "thumbs": sum(map(len, thumbs[name].values()))} if thumbs[name] else {})
        for name in names
    ]


def share(points: ByItem) -> Mapping[str, float]:
    """Mean over items of values from 0 to 1, with a 95% interval.

    An item is one observation: what its labellers say, and the pairs of its ranking, hang together.

    Wilson's interval, of as many wins or losses as the items are worth. Ties and means of several values vary less than
    wins and losses with the same mean p: n of them say as much as n p (1 - p) / variance. Both are taken with z^2 / 2
    wins and as many losses added (Agresti and Coull, 1998), so that items that are all the same are not certain.
    """
    items = [statistics.fmean(values) for values in points.values()]
    added, size = Z * Z / 2, len(items) + Z * Z
    mean = (sum(items) + added) / size
    variance = (sum(value * value for value in items) + added) / size - mean * mean
    n, won = len(items) * mean * (1 - mean) / variance, statistics.fmean(items)
    middle = (won + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(won * (1 - won) / n + Z * Z / (4 * n * n))
    return {"mean": won, "low": max(0.0, middle - half), "high": min(1.0, middle + half), "items": len(items)}
