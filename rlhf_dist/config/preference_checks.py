"""Rules between the keys of preference data, of the built-in task `describe` and of the pre-training mix."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_dist.config.paths import is_missing
from rlhf_dist.config.schema import Config, PreferencesConfig

if TYPE_CHECKING:  # checks.py joins these rules to its own
    from rlhf_dist.config.checks import Command

FORM_KEYS = {
    "pair": ("prompt_key", "chosen_key", "rejected_key"),
    "transcripts": ("chosen_key", "rejected_key"),
    "ranking": ("prompt_key", "responses_key", "ranks_key"),
    "battles": ("prompt_key", "responses_key", "winner_key"),
    "rating": ("prompt_key", "response_key", "rating_key"),
    "thumbs": ("prompt_key", "response_key", "rating_key"),
}
"""The columns that a form reads."""
WITH_MARGIN = ("pair", "transcripts")
WITH_BETTER = ("pair", "transcripts", "ranking")
"""Forms in which one response is better than another."""


def preference_problems(config: Config, command: Command) -> Iterator[str]:
    """A sentence for each problem: key, value, what would be right."""
    rules: list[Iterator[str]] = []
    if command == "reward":
        rules += [_source(config), _columns(config.preferences), _sizes(config)]
    if command in ("train", "eval"):
        rules += [_rewards(config)]
    if command == "train":
        rules += [_ptx(config)]
    if command == "sft":
        rules += [_sft(config)]
    return chain.from_iterable(rules)


def _describes(config: Config) -> bool:
    return config.data.source == "task" and config.data.task.name == "describe"


def _source(config: Config) -> Iterator[str]:
    preferences = config.preferences
    paths = (("path", preferences.path), ("eval_path", preferences.eval_path))
    if preferences.source != "task":
        if not preferences.path:
            yield f"preferences.path is empty; preferences.source {preferences.source} needs the path of its data"
        for key, value in paths:
            if value:
                yield from _file(f"preferences.{key}", value)
        return
    if not _describes(config):
        data = config.data
        found = f"task.name is {data.task.name}" if data.source == "task" else f"source is {data.source}"
        yield (
            f"data.{found}; preferences.source task needs data.source task and data.task.name describe, or "
            "set preferences.source, as in jsonl"
        )
    for key, value in paths:
        if value:
            yield (
                f"preferences.{key} is {value!r} and has no effect with preferences.source task; take it out, or set "
                "preferences.source, as in jsonl"
            )
    if preferences.form != "pair":
        yield (
            f"preferences.form is {preferences.form}; preferences.source task makes pairs: set it to pair, or set "
            "preferences.source, as in jsonl"
        )


def _columns(preferences: PreferencesConfig) -> Iterator[str]:
    form = preferences.form
    if preferences.source == "task":
        if preferences.margin_key:
            yield (
                f"preferences.margin_key is {preferences.margin_key!r} and has no effect with preferences.source task; "
                "take it out"
            )
        return
    named = {key: getattr(preferences, key) for key in FORM_KEYS[form]}
    for key, value in named.items():
        if not value:
            yield f"preferences.{key} is empty; preferences.form {form} needs the name of that column"
    if form not in WITH_MARGIN and preferences.margin_key:
        yield (
            f"preferences.margin_key is {preferences.margin_key!r} and has no effect with preferences.form {form}; "
            f"take it out, or set preferences.form to {' or '.join(WITH_MARGIN)}"
        )
    elif preferences.margin_key:
        named["margin_key"] = preferences.margin_key
    for (key, value), (other, same) in combinations(named.items(), 2):
        if value and value == same:
            yield f"preferences.{key} and preferences.{other} are both {value!r}; each needs a column of its own"
    if form == "rating" and preferences.rating_min >= preferences.rating_max:
        yield (
            f"preferences.rating_min is {preferences.rating_min:g}; it must be less than preferences.rating_max, "
            f"{preferences.rating_max:g}"
        )
    elif form == "rating" and not math.isfinite(preferences.rating_max - preferences.rating_min):
        yield (
            f"preferences.rating_min is {preferences.rating_min:g} and preferences.rating_max is "
            f"{preferences.rating_max:g}; their difference must be a finite number"
        )


def _sizes(config: Config) -> Iterator[str]:
    preferences, reward, ranks = config.preferences, config.reward, config.learner.ranks
    if reward.batch_size < ranks:
        yield (
            f"reward.batch_size is {reward.batch_size}; it must be at least learner.ranks, {ranks}: each rank needs a "
            "judgement"
        )
    if reward.lm_coef and preferences.source != "task" and preferences.form not in WITH_BETTER:
        yield (
            f"reward.lm_coef is {reward.lm_coef:g} and has no effect with preferences.form {preferences.form}, in "
            "which no response is the better one; set it to 0"
        )
    yield from _fits(config, "preferences.max_tokens", preferences.max_tokens)


def _sft(config: Config) -> Iterator[str]:
    if _describes(config) and config.sft.wrong_share:
        yield (
            f"sft.wrong_share is {config.sft.wrong_share} and has no effect with data.task.name describe, which knows "
            "no wrong answer; set it to 0"
        )


def _rewards(config: Config) -> Iterator[str]:
    for name, spec in config.scoring.rewards.items():
        if spec.kind in ("exact", "number") and _describes(config):
            yield (
                f"scoring.rewards.{name}.kind is {spec.kind}, which compares with the answer, but "
                "data.task.name describe has none; use gold, model, http, regex or function"
            )


def _ptx(config: Config) -> Iterator[str]:
    ptx = config.ptx
    if ptx.coef == 0:
        if ptx.path:
            yield f"ptx.path is {ptx.path!r} and has no effect with ptx.coef 0; take it out, or give ptx.coef a weight"
        return
    if ptx.source == "task":
        if config.data.source != "task":
            yield (
                f"ptx.source is task, demonstrations of data.task, but data.source is {config.data.source}; set "
                "ptx.source and ptx.path, as in ptx.source=jsonl"
            )
        if ptx.path:
            yield (
                f"ptx.path is {ptx.path!r} and has no effect with ptx.source task; take it out, or set ptx.source, as "
                "in jsonl"
            )
        if ptx.objective == "text":
            yield "ptx.objective is text, which needs a file; with ptx.source task it must be response"
    else:
        if ptx.path:
            yield from _file("ptx.path", ptx.path)
        else:
            yield f"ptx.path is empty; ptx.source {ptx.source} needs the path of its data"
        if not config.data.response_key:
            yield f"data.response_key is empty; ptx.source {ptx.source} needs the column with the texts to learn"
    yield from _fits(config, "ptx.max_tokens", ptx.max_tokens)


def _file(key: str, path: str) -> Iterator[str]:
    if is_missing(path):
        yield f"{not_there(key, path)}; give a file that does"
    elif os.path.isdir(path):
        yield f"{key} is {path!r}, a directory; it needs a file"


def not_there(key: str, path: str) -> str:
    """The beginning of a message about a path that does not exist; a relative one with the directory it starts from."""
    looked = "" if Path(path).is_absolute() else f" (looked in {Path.cwd()})"
    return f"{key} is {path!r}, which does not exist{looked}"


def _fits(config: Config, key: str, tokens: int) -> Iterator[str]:
    longest = config.model.tiny.max_positions
    if config.model.path == "tiny" and tokens > longest:
        yield f"{key} is {tokens}; it must be at most model.tiny.max_positions, {longest}"
