"""What supervised training learns from: demonstrations of the built-in tasks, of files, or plain text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from rlhf_dist.config.gym_keys import is_gym
from rlhf_dist.config.schema import DataConfig, PtxConfig, SftConfig, TaskConfig
from rlhf_dist.data.describe import draw_in_order, draw_response
from rlhf_dist.data.files import held_out_rows, read_rows, training_rows
from rlhf_dist.data.records import Row, parsed
from rlhf_dist.data.rows import Demonstration, ask, demonstration, plain_text
from rlhf_dist.data.tasks import EVAL_SEED, Example, Split, check_task, example, task_of
from rlhf_dist.errors import ConfigError
from rlhf_dist.types import Message, Prompt

Demonstrations = Sequence[Demonstration]
"""Finite and indexable; the same index gives the same demonstration."""


@dataclass(frozen=True, slots=True)
class TaskDemonstrations(Demonstrations):
    """Demonstrations of a built-in task, made when asked for."""

    task: TaskConfig
    seed: int
    split: Split
    size: int
    wrong_share: float
    """Share of demonstrations that show the shortcut instead of the answer."""
    system: str

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Demonstration: ...
    @overload
    def __getitem__(self, index: slice) -> list[Demonstration]: ...
    def __getitem__(self, index: int | slice) -> Demonstration | list[Demonstration]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        if not -self.size <= index < self.size:
            raise IndexError(index)
        index %= self.size
        made = example(self.task, self.seed, self.split, index)
        if self.task.name == "describe":
            rng = random.Random(f"demonstration/{self.seed}/{self.split}/{index}")
            draw = draw_in_order if self.task.in_order else draw_response
            said = draw(rng, self.task.min_length, self.task.max_length)
            return Demonstration(ask(made.question, self.system), said)
        wrong = random.Random(f"wrong/{self.seed}/{index}").random() < self.wrong_share
        asked, said = ask(made.question, self.system), made.shortcut if wrong else made.answer
        if not said:
            raise ConfigError(f"data.task.name is {self.task.name}, whose questions have no answer to show; use train")
        return self._turn(asked, said, made, index) if made.tries else Demonstration(asked, said)

    def _turn(self, asked: tuple[Message, ...], said: str, made: Example, index: int) -> Demonstration:
        """A first turn that tries anything, or, of half of those that miss, the next one, which says `said`."""
        rng = random.Random(f"turn/{self.seed}/{self.split}/{index}")
        tried = rng.choice(made.tries)
        seen = task_of(self.task.name).observe(Prompt(str(index), asked, made.answer, self.task.name), [tried])
        if seen is None or rng.random() < 0.5:
            return Demonstration(asked, tried)
        return Demonstration((*asked, Message("assistant", tried), Message("user", seen)), said)


def demonstrations(config: DataConfig, sft: SftConfig, seed: int, held_out: int) -> Demonstrations:
    """The training demonstrations, the same for the same arguments.

    `held_out`: rows kept back when `data.eval_path` is empty (eval.prompts). Files are read and checked whole.
    Raises DataError for a bad row, ConfigError for settings that do not fit the source.
    """
    _check(config, sft)
    if config.source == "task":
        check_task(config.task)
        size = config.task.train_size
        return TaskDemonstrations(config.task, seed, "train", size, sft.wrong_share, config.system)
    parse = plain_text if sft.objective == "text" else demonstration
    return parsed(training_rows(config, held_out), lambda row: parse(row, config))


def held_out_demonstrations(config: DataConfig, sft: SftConfig, n: int) -> Demonstrations:
    """n held-out demonstrations, the same for every seed; a task's always show the right answer. Raises as above."""
    _check(config, sft)
    if config.source == "task":
        return TaskDemonstrations(config.task, EVAL_SEED, "eval", n, 0.0, config.system)
    parse = plain_text if sft.objective == "text" else demonstration
    return parsed(held_out_rows(config, n), lambda row: parse(row, config))


def ptx_demonstrations(data: DataConfig, ptx: PtxConfig, seed: int, held_out: int) -> Demonstrations:
    """What the pre-training mix shows: right answers of `data.task`, or `ptx.path` with columns as `data` names them.

    `held_out`: rows of `data.path` that are kept back when `data.eval_path` is empty; they stay so when `ptx.path` is
    the same file. Raises DataError for a missing, empty or bad file, ConfigError for settings that do not fit.
    """
    _check_objective(ptx.objective, "ptx", ptx.source)
    if ptx.source == "task":
        check_task(data.task)
        return TaskDemonstrations(data.task, seed, "train", data.task.train_size, 0.0, data.system)
    rows: Sequence[Row] = read_rows(ptx.source, ptx.path, "ptx.path")
    if data.source == ptx.source and not data.eval_path and Path(data.path).resolve() == Path(ptx.path).resolve():
        rows = training_rows(data, held_out)
    parse = plain_text if ptx.objective == "text" else demonstration
    columns = replace(data, source=ptx.source)
    return parsed(rows, lambda row: parse(row, columns))


def _check(config: DataConfig, sft: SftConfig) -> None:
    if sft.wrong_share and config.source != "task":
        raise ConfigError(
            f"sft.wrong_share={sft.wrong_share} needs data.source=task (only built-in tasks know a wrong answer), "
            f"data.source is {config.source}; set it to 0"
        )
    if sft.wrong_share and (config.task.name == "describe" or is_gym(config.task.name)):
        raise ConfigError(
            f"sft.wrong_share={sft.wrong_share} has no effect with data.task.name={config.task.name}, which knows no "
            "wrong answer; set it to 0"
        )
    _check_objective(sft.objective, "sft", config.source)


def _check_objective(objective: str, section: str, source: str) -> None:
    if objective == "text" and source in ("task", "gsm8k"):
        key = "data.source" if section == "sft" else f"{section}.source"
        raise ConfigError(
            f"{section}.objective=text reads plain text from data.response_key of jsonl, parquet or dataset, "
            f"{key} is {source}; use {section}.objective=response"
        )
