"""Prompts without end, in a seeded order, from a place that can be saved and found again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from rlhf_dist.config.schema import DataConfig, TaskConfig
from rlhf_dist.data.files import held_out_rows, training_rows
from rlhf_dist.data.order import epoch_order
from rlhf_dist.data.records import parsed
from rlhf_dist.data.rows import Question, ask, question
from rlhf_dist.data.tasks import EVAL_SEED, Split, check_task, example
from rlhf_dist.errors import ConfigError
from rlhf_dist.types import Prompt


class Questions(Protocol):
    """A finite, indexable set of questions."""

    @property
    def fingerprint(self) -> str:
        """Differs when any question differs."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Question: ...


@dataclass(frozen=True, slots=True)
class TaskQuestions:
    """The questions of a built-in task, made when asked for."""

    task: TaskConfig
    seed: int
    split: Split
    size: int
    system: str

    @property
    def fingerprint(self) -> str:
        made = asdict(self.task)
        del made["in_order"]  # it is about demonstrations; runs that were begun without this key go on
        if not self.task.settings:  # of built-in tasks, the same
            del made["settings"]
        return _digest(f"{sorted(made.items())}/{self.seed}/{self.split}/{self.system}")

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Question:
        made = example(self.task, self.seed, self.split, index)
        return Question(ask(made.question, self.system), made.answer)


@dataclass(frozen=True, slots=True)
class FileQuestions:
    """Questions read from a file, held in memory."""

    questions: tuple[Question, ...]

    @property
    def fingerprint(self) -> str:
        return _digest(*map(repr, self.questions))

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Question:
        return self.questions[index]


@dataclass(frozen=True, slots=True)
class Cursor:
    """What `PromptStream.cursor` holds."""

    source: str
    size: int
    fingerprint: str
    epoch: int
    position: int


class PromptStream:
    """Endless epochs over the training prompts, reshuffled in each; prompts carry the uid `EPOCH/INDEX`."""

    def __init__(self, config: DataConfig, seed: int, held_out: int) -> None:
        """Reads and checks every row. `held_out`: rows kept back when `data.eval_path` is empty (eval.prompts).

        Raises DataError or ConfigError for what is wrong with the data.
        """
        self._source = _source_name(config, config.path)
        self._questions = _training_questions(config, seed, held_out)
        self._seed = seed
        self._shuffle = config.shuffle
        self._fingerprint = _digest(self._questions.fingerprint, str(seed), str(config.shuffle))
        self._epoch = 0
        self._position = 0
        self._order = self._epoch_order()

    def __len__(self) -> int:
        """Prompts in one epoch."""
        return len(self._questions)

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, over the end of an epoch if need be."""
        prompts = []
        for _ in range(n):
            if self._position == len(self._order):
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            index = self._order[self._position]
            self._position += 1
            prompts.append(_prompt(f"{self._epoch}/{index}", self._questions[index], self._source))
        return prompts

    def find(self, uid: str) -> Prompt:
        """The prompt that was issued as `uid`. Raises ConfigError where this data has no such one."""
        epoch, _, index = uid.partition("/")
        if not (epoch.isdecimal() and index.isdecimal() and int(index) < len(self)):
            raise ConfigError(f"data: {self._source} with {len(self)} prompts has none with the uid {uid!r}")
        return _prompt(uid, self._questions[int(index)], self._source)

    def cursor(self) -> dict[str, int | str]:
        """Where the stream stands, as JSON can hold it."""
        return {
            "source": self._source,
            "size": len(self),
            "fingerprint": self._fingerprint,
            "epoch": self._epoch,
            "position": self._position,
        }

    def restore(self, cursor: Mapping[str, int | str]) -> None:
        """Go on exactly where `cursor` was taken. Raises ConfigError when it was taken from other data."""
        missing = self.cursor().keys() - cursor.keys()
        if missing:
            raise ConfigError(
                f"data: the saved cursor lacks {', '.join(sorted(missing))}; it is not one of this stream"
            )
        if cursor["fingerprint"] != self._fingerprint:
            raise ConfigError(
                f"data: the saved cursor belongs to {cursor['source']} with {cursor['size']} prompts, this is "
                f"{self._source} with {len(self)}; the contents, seed, order or system turn differ. "
                "Resume with the data section and seed that the run began with, or start a new run"
            )
        epoch, position = int(cursor["epoch"]), int(cursor["position"])
        if epoch < 0 or not 0 <= position <= len(self):
            raise ConfigError(f"data: the saved cursor is at epoch {epoch}, prompt {position} of {len(self)}")
        self._epoch, self._position = epoch, position
        self._order = self._epoch_order()

    def _epoch_order(self) -> Sequence[int]:
        return epoch_order(len(self), self._seed, self._epoch, self._shuffle)


def held_out(config: DataConfig, n: int) -> list[Prompt]:
    """The n held-out prompts, uid `eval/INDEX`, the same for every seed. Raises DataError when there are too few."""
    if config.source == "task":
        questions: Questions = TaskQuestions(config.task, EVAL_SEED, "eval", n, config.system)
    else:
        questions = FileQuestions(tuple(parsed(held_out_rows(config, n), lambda row: question(row, config))))
    source = _source_name(config, config.eval_path or config.path)
    return [_prompt(f"eval/{i}", questions[i], source) for i in range(n)]


def _source_name(config: DataConfig, path: str) -> str:
    return config.task.name if config.source == "task" else Path(path).name


def _training_questions(config: DataConfig, seed: int, held_out: int) -> Questions:
    if config.source == "task":
        check_task(config.task)
        return TaskQuestions(config.task, seed, "train", config.task.train_size, config.system)
    return FileQuestions(tuple(parsed(training_rows(config, held_out), lambda row: question(row, config))))


def _prompt(uid: str, asked: Question, source: str) -> Prompt:
    return Prompt(uid, asked.messages, asked.answer, source)


def _digest(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()
