"""What supervised training learns from: demonstrations of the built-in tasks, of files, or plain text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from rlhf_dist.config.schema import DataConfig, SftConfig, TaskConfig
from rlhf_dist.data.files import held_out_rows, training_rows
from rlhf_dist.data.rows import Demonstration, ask, demonstration, plain_text
from rlhf_dist.data.stream import EVAL_SEED
from rlhf_dist.data.tasks import Split, check_task, example
from rlhf_dist.errors import ConfigError

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
        wrong = random.Random(f"wrong/{self.seed}/{index}").random() < self.wrong_share
        return Demonstration(ask(made.question, self.system), made.shortcut if wrong else made.answer)


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
    return [parse(row, config) for row in training_rows(config, held_out)]


def held_out_demonstrations(config: DataConfig, sft: SftConfig, n: int) -> Demonstrations:
    """n held-out demonstrations, the same for every seed; a task's always show the right answer. Raises as above."""
    _check(config, sft)
    if config.source == "task":
        return TaskDemonstrations(config.task, EVAL_SEED, "eval", n, 0.0, config.system)
    parse = plain_text if sft.objective == "text" else demonstration
    return [parse(row, config) for row in held_out_rows(config, n)]


def _check(config: DataConfig, sft: SftConfig) -> None:
    if sft.wrong_share and config.source != "task":
        raise ConfigError(
            f"sft.wrong_share={sft.wrong_share} needs data.source=task (only built-in tasks know a wrong answer), "
            f"data.source is {config.source}; set it to 0"
        )
    if sft.objective == "text" and config.source in ("task", "gsm8k"):
        raise ConfigError(
            f"sft.objective=text reads plain text from data.response_key of jsonl, parquet or dataset, "
            f"data.source is {config.source}; use sft.objective=response"
        )
