"""Rewards that are NaN or infinite, or that failed, and what `scoring.non_finite` makes of the former. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rlhf_dist.scoring.score_list import short
from rlhf_dist.types import NonFinite

DONE = {"mask": ("is left out", "are left out"), "zero": ("counts as 0 there", "count as 0 there")}
"""`scoring.non_finite` -> what becomes of a response, and of several."""


Failures = Mapping[str, Mapping[int, str]]
"""Name of a reward -> response -> why it failed there."""
NO_FAILURES: Failures = {}


def find_non_finite(
    components: Mapping[str, np.ndarray], responses: Sequence[str], uid: str = "", failures: Failures = NO_FAILURES
) -> tuple[NonFinite, ...]:
    """The responses with a reward that is not finite or failed, in their order.

    components: name -> float32 [n]; responses: n texts; uid: of their prompt, empty where each has its own.
    """
    found = []
    for i, response in enumerate(responses):
        failed = {name: why[i] for name, why in failures.items() if i in why}
        values = {name: float(values[i]) for name, values in components.items() if name not in failed}
        rewards = {name: value for name, value in values.items() if not np.isfinite(value)}
        if rewards or failed:
            found.append(NonFinite(uid, i, rewards, short(response), failed))
    return tuple(found)


def zeroed(components: Mapping[str, np.ndarray], failures: Failures = NO_FAILURES) -> dict[str, np.ndarray]:
    """The same with 0 in the place of every reward that came and is not finite; name -> float32 [n]."""
    zero = {name: np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) for name, values in components.items()}
    for name, why in failures.items():
        zero[name][list(why)] = np.nan
    return zero


def refusal(who: str, found: NonFinite) -> str:
    """Why a run ends at `found`: its first reward, that of `who` (as in `the reward brief`), and the way out."""
    value = next(iter(found.rewards.values()))
    return (
        f"{who} returned {value:g}, not finite in float32, for {_place(found)}; mend it, or set scoring.non_finite to "
        "mask or zero; a run that has begun goes on with --resume"
    )


def told(found: Sequence[NonFinite], policy: str) -> str:
    """What is to be said of them, at least one: how many, of which rewards, what was done, the first by name; first of
    those that failed."""
    failed, came = [bad for bad in found if bad.failed], [bad for bad in found if bad.rewards]
    parts = list[str]()
    if failed:
        many = len(failed) > 1
        has = "responses have" if many else "response has"
        parts.append(
            f"{len(failed)} {has} no reward, which failed ({failed_rewards(failed)}), and {DONE['mask'][many]} "
            f"(scoring.on_failure: mask); the first: {first_of(failed)}"
        )
    if came:
        many = len(came) > 1
        has = "responses have rewards that are" if many else "response has a reward that is"
        by_reward = _by_reward(name for bad in came for name in bad.rewards)
        value = _value(came[0])
        parts.append(
            f"{len(came)} {has} not finite ({by_reward}) and {DONE[policy][many]} (scoring.non_finite: {policy}); "
            f"the first: {value}"
        )
    return "; ".join(parts)


def failed_rewards(found: Sequence[NonFinite]) -> str:
    """Which rewards failed and how often, as in `brief 2, far 1`."""
    return _by_reward(name for bad in found for name in bad.failed)


def first_of(found: Sequence[NonFinite]) -> str:
    """The first in words: reward, value or why it failed, response, prompt."""
    first = found[0]
    return f"{next(iter(first.failed.values()))}, for {_place(first)}" if first.failed else _value(first)


def _by_reward(names: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in Counter(names).items())


def _value(found: NonFinite) -> str:
    name, value = next(iter(found.rewards.items()))
    return f"{name} is {value:g} for {_place(found)}"


def _place(found: NonFinite) -> str:
    prompt = f" of prompt {found.uid}" if found.uid else ""
    return f"response {found.sample}{prompt}: {found.response}"
