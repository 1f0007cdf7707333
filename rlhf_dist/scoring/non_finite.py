"""Rewards that are NaN or infinite, and what `scoring.non_finite` makes of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from rlhf_dist.scoring.score_list import short
from rlhf_dist.types import NonFinite

DONE = {"mask": ("is left out", "are left out"), "zero": ("counts as 0 there", "count as 0 there")}
"""`scoring.non_finite` -> what becomes of a response, and of several."""


def find_non_finite(
    components: Mapping[str, np.ndarray], responses: Sequence[str], uid: str = ""
) -> tuple[NonFinite, ...]:
    """The responses with a reward that is not finite, in their order.

    components: name -> float32 [n]; responses: n texts; uid: of their prompt, empty where each has its own.
    """
    found = []
    for i, response in enumerate(responses):
        rewards = {name: float(values[i]) for name, values in components.items() if not np.isfinite(values[i])}
        if rewards:
            found.append(NonFinite(uid, i, rewards, short(response)))
    return tuple(found)


def zeroed(components: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same with 0 in the place of every reward that is not finite; name -> float32 [n]."""
    return {name: np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) for name, values in components.items()}


def refusal(who: str, found: NonFinite) -> str:
    """Why a run ends at `found`: its first reward, that of `who` (as in `the reward brief`), and the way out."""
    value = next(iter(found.rewards.values()))
    return (
        f"{who} returned {value:g}, not finite in float32, for {_place(found)}; mend it, or set scoring.non_finite to "
        "mask or zero; a run that has begun goes on with --resume"
    )


def told(found: Sequence[NonFinite], policy: str) -> str:
    """One sentence for all of them, at least one: how many, of which rewards, what was done, the first by name."""
    by_reward = ", ".join(f"{name} {count}" for name, count in Counter(n for x in found for n in x.rewards).items())
    many = len(found) > 1
    return (
        f"{len(found)} {'responses have rewards that are' if many else 'response has a reward that is'} not finite "
        f"({by_reward}) and {DONE[policy][many]} (scoring.non_finite: {policy}); the first: {first_of(found)}"
    )


def first_of(found: Sequence[NonFinite]) -> str:
    """The first in words: reward, value, response, prompt."""
    name, value = next(iter(found[0].rewards.items()))
    return f"{name} is {value:g} for {_place(found[0])}"


def _place(found: NonFinite) -> str:
    prompt = f" of prompt {found.uid}" if found.uid else ""
    return f"response {found.sample}{prompt}: {found.response}"
