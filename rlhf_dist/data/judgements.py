"""What a reward model learns from: comparisons and ratings of files, or of the built-in task `describe`."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, combinations
from typing import Literal, TypeVar, overload

from rlhf_dist.config.schema import DataConfig, PreferencesConfig
from rlhf_dist.data.battles import battle, elo_judgements
from rlhf_dist.data.describe import draw_order, draw_response, draw_writer
from rlhf_dist.data.files import check_enough, read_rows
from rlhf_dist.data.judgement_rows import (
    Comparison as Comparison,
    Judgement as Judgement,
    NoJudgement,
    Pair as Pair,
    Rating as Rating,
    judgement,
)
from rlhf_dist.data.records import Row, listed
from rlhf_dist.data.rows import ask
from rlhf_dist.data.tasks import EVAL_SEED, Split, check_task, example
from rlhf_dist.errors import ConfigError, DataError

Item = TypeVar("Item")
Part = Literal["whole", "train", "held_out"]
Unusable = Literal["refuse", "drop"]
WAY_OUT = "take the row out, or set preferences.unusable=drop"
"""For rows that nothing can be learnt from."""


@dataclass(frozen=True, slots=True)
class TaskComparisons(Sequence[Comparison]):
    """Comparisons of the task `describe`, made when asked for; the same index gives the same one on every machine."""

    data: DataConfig
    seed: int
    split: Split
    size: int
    noise: float
    """Temperature of the labels."""
    responses: int
    """To one prompt; all their pairs are told."""
    dropped: tuple[str, ...] = ()
    """None ever is."""

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Comparison: ...
    @overload
    def __getitem__(self, index: slice) -> list[Comparison]: ...
    def __getitem__(self, index: int | slice) -> Comparison | list[Comparison]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        return self._make(index % self.size)

    def _make(self, index: int) -> Comparison:
        task = self.data.task
        question = example(task, self.seed, self.split, index).question
        rng = random.Random(f"comparison/{self.seed}/{self.split}/{index}")
        drawn: dict[str, None] = {}
        while len(drawn) < self.responses:
            # From many writers, as human comparisons are: a reward model has to know what is far from the start, too.
            drawn[draw_response(rng, task.min_length, task.max_length, draw_writer(rng))] = None
        order = draw_order(rng, tuple(drawn), self.noise)
        pairs = tuple(Pair(better, worse, 0.0) for better, worse in combinations(order, 2))
        place = f"{task.name} {self.split}/{index}"
        return Comparison(place, ask(question, self.data.system), tuple(drawn), pairs)


@dataclass(frozen=True, slots=True)
class FileJudgements(Sequence[Judgement]):
    """Judgements of a file, held in memory."""

    items: Sequence[Judgement]
    dropped: tuple[str, ...]
    """Why a row was left out, a sentence for each; of battles, the whole file's."""

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> Judgement: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Judgement]: ...
    def __getitem__(self, index: int | slice) -> Judgement | Sequence[Judgement]:
        return self.items[index]


Judgements = TaskComparisons | FileJudgements
"""Finite and indexable; the same index gives the same judgement."""


def judgements(
    preferences: PreferencesConfig, data: DataConfig, seed: int, unusable: Unusable = "refuse"
) -> Judgements:
    """The training judgements, the same for the same arguments; of a file, all but the held-out ones.

    `seed` is that of the task's comparisons; `unusable` says what becomes of rows that nothing can be learnt from
    (`NoJudgement`). Raises DataError for a bad row, ConfigError for settings that do not fit the source.
    """
    if preferences.source == "task":
        check_describe(data)
        return TaskComparisons(data, seed, "train", preferences.train_size, preferences.noise, preferences.responses)
    part = "whole" if preferences.eval_path else "train"
    return _read(preferences, data, preferences.path, "preferences.path", part, unusable)


def held_out_judgements(preferences: PreferencesConfig, data: DataConfig, unusable: Unusable = "refuse") -> Judgements:
    """The held-out judgements, the same for every seed: all of `eval_path`, or the last `held_out` of `path`.

    Of battles whole prompts are held out, so that none is on both sides: the last ones that make up `held_out` ratings,
    or a few more. Raises as above.
    """
    if preferences.source == "task":
        check_describe(data)
        return TaskComparisons(data, EVAL_SEED, "eval", preferences.held_out, preferences.noise, preferences.responses)
    if preferences.eval_path:
        return _read(preferences, data, preferences.eval_path, "preferences.eval_path", "whole", unusable)
    return _read(preferences, data, preferences.path, "preferences.path", "held_out", unusable)


def check_describe(data: DataConfig) -> None:
    """Raises ConfigError when there is no built-in task to compare responses of."""
    if data.source != "task" or data.task.name != "describe":
        named = f"data.task.name is {data.task.name}" if data.source == "task" else f"data.source is {data.source}"
        raise ConfigError(
            f"preferences.source=task needs data.source=task and data.task.name=describe, {named}; set them so, or "
            "preferences.source to jsonl or parquet"
        )
    check_task(data.task)


def _read(
    preferences: PreferencesConfig, data: DataConfig, path: str, key: str, part: Part, unusable: Unusable
) -> FileJudgements:
    rows = read_rows(preferences.source, path, key)
    if preferences.form == "battles":
        battles, dropped = _parsed(rows, lambda row: battle(row, preferences, data), unusable)
        prompts = elo_judgements(battles)
        kept = 0 if part == "whole" else _prompts_held_out(path, [len(ratings) for ratings in prompts], preferences)
        items: Sequence[Judgement] = list(chain.from_iterable(_part(prompts, kept, part)))
    else:
        kept = 0 if part == "whole" else preferences.held_out
        check_enough(path, len(rows), kept, "preferences.held_out", "preferences.eval_path")
        items, dropped = _parsed(_part(rows, kept, part), lambda row: judgement(row, preferences, data), unusable)
    if not items:
        raise DataError(f"{path}: has no row to learn from; the first was left out because of {dropped[0]}")
    return FileJudgements(items, dropped)


def _parsed(
    rows: Sequence[Row], parse: Callable[[Row], Item], unusable: Unusable
) -> tuple[list[Item], tuple[str, ...]]:
    """What the rows say, and why some say nothing. Raises one DataError for all that are wrong."""
    items: list[Item] = []
    dropped: list[str] = []
    wrong: list[str] = []
    for row in rows:
        try:
            items.append(parse(row))
        except NoJudgement as error:
            dropped.append(str(error))
        except DataError as error:
            wrong.append(str(error))
    if unusable == "refuse" and dropped:
        raise DataError(listed([*wrong, *dropped], len(rows), WAY_OUT if not wrong else ""))
    if wrong:
        raise DataError(listed(wrong, len(rows)))
    return items, tuple(dropped)


def _part(items: Sequence[Item], kept: int, part: Part) -> Sequence[Item]:
    """All, all but the last `kept`, or those."""
    cut = len(items) - kept
    return items[cut:] if part == "held_out" else items[:cut]


def _prompts_held_out(path: str, sizes: Sequence[int], preferences: PreferencesConfig) -> int:
    """How many of the last prompts make up `held_out` ratings. sizes: ratings of each prompt."""
    most = sum(sizes[1:])
    if preferences.held_out > most:
        smaller = f"set preferences.held_out to at most {most} or " if most else ""
        raise DataError(
            f"{path}: has {sum(sizes)} ratings of {len(sizes)} prompts, too few to hold out "
            f"preferences.held_out={preferences.held_out} and keep a prompt to train on; "
            f"{smaller}name a separate preferences.eval_path"
        )
    return next(i for i, total in enumerate(accumulate(reversed(sizes)), 1) if total >= preferences.held_out)
