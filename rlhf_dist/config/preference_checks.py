"""Rules between the keys of preference data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations

from rlhf_dist.config.effects import WITH_BETTER, WITH_MARGIN
from rlhf_dist.config.prefer_keys import PREFER_METHODS
from rlhf_dist.config.schema import Config, PreferencesConfig

FORM_KEYS = {
    "pair": ("prompt_key", "chosen_key", "rejected_key"),
    "transcripts": ("chosen_key", "rejected_key"),
    "ranking": ("prompt_key", "responses_key", "ranks_key"),
    "battles": ("prompt_key", "responses_key", "winner_key"),
    "rating": ("prompt_key", "response_key", "rating_key"),
    "thumbs": ("prompt_key", "response_key", "rating_key"),
}
"""The columns that a form reads."""


def preference_problems(config: Config) -> Iterator[str]:
    """For `reward` and `prefer`: a sentence for each problem, with key, value, what would be right."""
    data = config.data
    if config.preferences.source != "task":
        yield from _columns(config.preferences)
    elif data.source != "task" or data.task.name != "describe":
        found = f"task.name is {data.task.name}" if data.source == "task" else f"source is {data.source}"
        yield (
            f"data.{found}; preferences.source task needs data.source task and data.task.name describe, or set "
            "preferences.source, as in jsonl"
        )


def prefer_problems(config: Config) -> Iterator[str]:
    """The same for `prefer` alone: what its methods cannot learn from."""
    method, preferences = config.prefer.method, config.preferences
    if preferences.source == "task":
        return
    forms = (*WITH_BETTER, *(("thumbs",) if PREFER_METHODS[method].singles else ()))
    if preferences.form not in forms:
        lacks = "says how good a response is" if preferences.form != "thumbs" else "judges one response at a time"
        others = [name for name, row in PREFER_METHODS.items() if row.singles] if preferences.form == "thumbs" else []
        other = f", or set prefer.method to {' or '.join(others)}" if others else ""
        yield (
            f"preferences.form is {preferences.form}, which {lacks}, and prefer.method {method} learns which of two is "
            f"better{' or whether one is good' if 'thumbs' in forms else ''}: give data of the form "
            f"{', '.join(forms[:-1])} or {forms[-1]}{other}; "
            "a reward model (`rlhf-dist reward`) learns from every form"
        )
    if preferences.margin_key:
        yield (
            f"preferences.margin_key is {preferences.margin_key!r} and prefer.method {method} does not learn by how "
            "much a side is better; take it out, and the column is not read"
        )


def _columns(preferences: PreferencesConfig) -> Iterator[str]:
    form, low, high = preferences.form, preferences.rating_min, preferences.rating_max
    named = {key: getattr(preferences, key) for key in FORM_KEYS[form]}
    for key, value in named.items():
        if not value:
            yield f"preferences.{key} is empty; preferences.form {form} needs the name of that column"
    if form in WITH_MARGIN:
        named["margin_key"] = preferences.margin_key
    for (key, value), (other, same) in combinations(named.items(), 2):
        if value and value == same:
            yield f"preferences.{key} and preferences.{other} are both {value!r}; each needs a column of its own"
    if form == "rating" and low >= high:
        yield f"preferences.rating_min is {low:g}; it must be less than preferences.rating_max, {high:g}"
    elif form == "rating" and not math.isfinite(high - low):
        yield (
            f"preferences.rating_min is {low:g} and preferences.rating_max is {high:g}; their difference must be a "
            "finite number"
        )
