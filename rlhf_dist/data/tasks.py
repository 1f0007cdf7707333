"""Procedural tasks: endless, seeded, with checkable answers or (`describe`) a gold reward; reasoning_gym's too.

The text of a question decides by a stable hash whether it belongs to the training or to the held-out split, so the two
never share a question, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_dist.config.gym_keys import is_gym
from rlhf_dist.config.schema import TaskConfig
from rlhf_dist.data.describe import draw_question
from rlhf_dist.data.gym import draw, tasks_of
from rlhf_dist.errors import ConfigError
from rlhf_dist.types import Prompt

Split = Literal["train", "eval"]

EVAL_SEED = 0
"""Held-out questions are the same for every seed of a run, so that runs can be compared."""
EVAL_SHARE = 8
"""One question in so many is held out."""
DRAWS = 2000
"""Redraws before a task counts as too small to have a question of a split."""


@dataclass(frozen=True, slots=True)
class Example:
    """One question of a task."""

    question: str
    """Lower-case letters, digits and `:+-= ` only; any text from reasoning_gym."""
    answer: str
    """The one right response; empty for `describe` and some tasks of reasoning_gym, which have none."""
    shortcut: str
    """A plausible response that is wrong, always different from `answer`; empty for tasks that know none."""
    number: int = 0
    """Of the item in reasoning_gym; 0 for the built-in tasks."""
    tries: tuple[str, ...] = ()
    """What a first response may try, in a task of several turns; empty in one of a single turn."""


Observe = Callable[[Prompt, Sequence[str]], str | None]
"""(prompt, responses so far) -> what the user says next; None: the conversation is at its end. Pure."""


@dataclass(frozen=True, slots=True)
class Task:
    """How a task makes its questions, and what it says to the responses."""

    draw: Callable[[TaskConfig, random.Random], Example]
    observe: Observe
    """Only the last response is scored, against the prompt's answer."""


def example(task: TaskConfig, seed: int, split: Split, index: int) -> Example:
    """The question number `index` of a split: the same for the same arguments on every machine.

    Questions whose shortcut would be right (palindromes to reverse, sorted words to sort) are drawn again.
    Raises ConfigError when the lengths leave no question to draw.
    """
    check_task(task)
    # A string seeds through SHA-512: stable between processes and Python versions, unlike hash().
    rng = random.Random(f"{task.name}/{seed}/{split}/{index}")
    for _ in range(DRAWS):
        drawn = task_of(task.name).draw(task, rng)
        usable = not drawn.shortcut or drawn.answer != drawn.shortcut
        if usable and split_of(drawn.question) == split:
            return drawn
    if is_gym(task.name):
        raise ConfigError(f"data.task: {task.name} has too few different questions for the {split} split")
    raise ConfigError(
        f"data.task: {task.name} with min_length={task.min_length} and max_length={task.max_length} "
        f"has too few different questions for the {split} split; give a larger max_length"
    )


def example_of(task: TaskConfig, seed: int, uid: str) -> Example:
    """The question of a prompt by its uid (`stream.py`), in a run with this seed."""
    epoch, _, index = uid.partition("/")
    held_out = epoch == "eval"
    return example(task, EVAL_SEED if held_out else seed, "eval" if held_out else "train", int(index))


def task_of(name: str) -> Task:
    """By `data.task.name`."""
    return GYM if is_gym(name) else TASKS[name]


def check_task(task: TaskConfig) -> None:
    """Raises ConfigError for lengths or a size that no question can have, and for what reasoning_gym does not have."""
    if is_gym(task.name):
        tasks_of(task)
        return
    if not 1 <= task.min_length <= task.max_length:
        raise ConfigError(
            f"data.task: min_length={task.min_length} and max_length={task.max_length}; "
            "needed is 1 <= min_length <= max_length"
        )
    if task.train_size < 1:
        raise ConfigError(f"data.task.train_size={task.train_size}; at least 1 is needed")


def split_of(question: str) -> Split:
    """The split that a question's text belongs to: one in `EVAL_SHARE` is held out."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % EVAL_SHARE == 0 else "train"


def ends(prompt: Prompt, responses: Sequence[str]) -> None:
    """A task of a single turn: nothing follows a response."""


def hint(prompt: Prompt, responses: Sequence[str]) -> str | None:
    """`guess`: where the word that is meant stands, seen from the first response; nothing more after that.

    `left` or `right` of it in the list, `none` after a response that is not in the list; None after a right one.
    """
    tried, words = responses[-1].strip(), prompt.messages[-1].content.split()[1:]
    if len(responses) > 1 or tried == prompt.answer:
        return None
    if tried not in words:
        return "none"
    return "left" if words.index(prompt.answer) < words.index(tried) else "right"


def _gym(task: TaskConfig, rng: random.Random) -> Example:
    number, question, answer = draw(task, rng)
    return Example(question, answer, shortcut="", number=number)


def _describe(task: TaskConfig, rng: random.Random) -> Example:
    return Example(draw_question(rng), answer="", shortcut="")


def _reverse(task: TaskConfig, rng: random.Random) -> Example:
    word = _word(task, rng, string.ascii_lowercase)
    return Example(f"reverse: {word}", word[::-1], shortcut=word)


def _sort(task: TaskConfig, rng: random.Random) -> Example:
    word = _word(task, rng, string.ascii_lowercase)
    return Example(f"sort: {word}", "".join(sorted(word)), shortcut=word)


def _guess(task: TaskConfig, rng: random.Random) -> Example:
    """One of three different words, which nothing in the question tells.

    Who tries the middle one first is right after the hint, always. From another one it is 2 of 3, and so it is for who
    does not read the hint and says another word: the first turn's tokens are worth what the second turn makes of them.
    """
    words: list[str] = []
    while len(words) < 3:
        word = _word(task, rng, string.ascii_lowercase)
        words += [word] if word not in words else []
    answer, shortcut, _ = rng.sample(words, 3)
    return Example(f"guess: {' '.join(words)}", answer, shortcut, tries=tuple(words))


def _arithmetic(task: TaskConfig, rng: random.Random) -> Example:
    """Sums, and differences that are never negative; the shortcut copies the first number."""
    left, right = _number(task, rng), _number(task, rng)
    if rng.random() < 0.5:
        return Example(f"{left}+{right}=", str(left + right), shortcut=str(left))
    left, right = max(left, right), min(left, right)
    return Example(f"{left}-{right}=", str(left - right), shortcut=str(left))


def _sums(task: TaskConfig, rng: random.Random) -> Example:
    """Asked in words, for models that have learnt to be asked; the shortcut repeats the first number."""
    left, right = _number(task, rng), _number(task, rng)
    return Example(f"What is {left} plus {right}?", str(left + right), shortcut=str(left))


def _count(task: TaskConfig, rng: random.Random) -> Example:
    """Words of at most three letters of the alphabet, for counts above one; the shortcut is the word's length."""
    letters = rng.sample(string.ascii_lowercase, 3)
    word = _word(task, rng, "".join(letters))
    letter = rng.choice(letters)
    return Example(f"count {letter} in {word}:", str(word.count(letter)), shortcut=str(len(word)))


def _word(task: TaskConfig, rng: random.Random, letters: str) -> str:
    return "".join(rng.choices(letters, k=rng.randint(task.min_length, task.max_length)))


def _number(task: TaskConfig, rng: random.Random) -> int:
    digits = rng.randint(task.min_length, task.max_length)
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


TASKS: Mapping[str, Task] = {
    "arithmetic": Task(_arithmetic, ends),
    "sums": Task(_sums, ends),
    "reverse": Task(_reverse, ends),
    "sort": Task(_sort, ends),
    "count": Task(_count, ends),
    "describe": Task(_describe, ends),
    "guess": Task(_guess, hint),
}
"""By `data.task.name`, which is the `source` of its prompts too."""
GYM = Task(_gym, ends)
"""Every task of reasoning_gym."""
