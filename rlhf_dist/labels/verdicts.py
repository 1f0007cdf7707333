"""What people can say of an item: the kinds of judgement, from what was clicked to what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

from rlhf_dist.data.records import shown as repr_of
from rlhf_dist.errors import InputError

Judge = Literal["pair", "ranking", "stars", "thumbs"]
"""pair: which of two is better; ranking: the order of 2 to 9; stars: 0 to 5 for one; thumbs: one, good or not."""
JUDGES: tuple[str, ...] = get_args(Judge)
Verdict = int | str | bool | list[int]
"""In the order of the item's own responses, whatever the page showed. pair: 0 or 1, the better one, TIE or BOTH_BAD;
ranking: their indices, the best first; stars: 0 to 5; thumbs: True for up. SKIP of every kind."""
TIE, BOTH_BAD, SKIP = "tie", "both_bad", "skip"
SIDES = ("left", "right")
THUMBS = {"up": True, "down": False}
MOST_STARS = 5
MOST_RANKED = 9
"""One key each."""
FLAGS = ("spam", "unsafe", "unrankable")
NEAR_STARS = 1
"""So far from a gold item's stars is right, too."""


def stored_verdict(judge: Judge, shown: Sequence[int], said: object) -> Verdict:
    """What the page sent, in the order of the item's own responses.

    shown: the index of the response in each place of the page. Raises InputError for what is no verdict.
    """
    if said == SKIP:
        return SKIP
    if judge == "pair" and said in (TIE, BOTH_BAD):
        return cast(str, said)
    if judge == "pair" and isinstance(said, str) and said in SIDES:
        return shown[SIDES.index(said)]
    if judge == "thumbs" and isinstance(said, str) and said in THUMBS:
        return THUMBS[said]
    if judge == "stars" and isinstance(said, int) and not isinstance(said, bool) and 0 <= said <= MOST_STARS:
        return said
    if judge == "ranking" and _is_order(said, len(shown)):
        return [shown[place] for place in cast(list[int], said)]
    raise InputError(f"{repr_of(said)} is no verdict; it has to be {_right(judge, len(shown))} or 'skip'")


def _is_order(said: object, size: int) -> bool:
    if not isinstance(said, list) or any(type(place) is not int for place in said):
        return False
    return sorted(said) == list(range(size))


def _right(judge: Judge, size: int) -> str:
    return {
        "pair": "'left', 'right', 'tie', 'both_bad'",
        "ranking": f"a list of the places 0 to {size - 1}, each once, the best first,",
        "stars": f"a whole number from 0 to {MOST_STARS}",
        "thumbs": "'up', 'down'",
    }[judge]


def shown_verdict(judge: Judge, shown: Sequence[int], verdict: Verdict) -> Verdict:
    """The other way round: what the page sent, for a decision that is taken back."""
    if judge == "pair" and isinstance(verdict, int):
        return SIDES[list(shown).index(verdict)]
    if judge == "thumbs" and isinstance(verdict, bool):
        return "up" if verdict else "down"
    if isinstance(verdict, list):
        return [list(shown).index(index) for index in verdict]
    return verdict


def gold_verdict(judge: Judge, values: Sequence[float]) -> Verdict | None:
    """What is right, from how good each response is; None where that says nothing for this kind of judgement.

    values: higher is better; of stars their number, of thumbs above 0 for up.
    """
    if judge == "pair":
        first, second = values
        return TIE if first == second else int(second > first)
    if judge == "ranking":
        best_first = sorted(range(len(values)), key=lambda i: -values[i])
        return best_first if len(set(values)) == len(values) else None
    if judge == "stars":
        return round(values[0]) if 0 <= values[0] <= MOST_STARS else None
    return values[0] > 0


def is_right(judge: Judge, gold: Verdict, verdict: Verdict) -> bool:
    """Whether a decision about a gold item is right: stars may be one off, and both bad counts as a tie."""
    if judge == "stars" and isinstance(gold, int) and isinstance(verdict, int):
        return abs(gold - verdict) <= NEAR_STARS
    return gold == (TIE if verdict == BOTH_BAD else verdict)
