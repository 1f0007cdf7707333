import re
import string
import subprocess
import sys

import pytest

from rlhf_dist.config.schema import TaskConfig
from rlhf_dist.data.tasks import example, split_of
from rlhf_dist.errors import ConfigError

NAMES = ("arithmetic", "reverse", "sort", "count")


def solve(question: str) -> str:
    """Another way to the answer than the one under test."""
    if match := re.fullmatch(r"(\d+)([+-])(\d+)=", question):
        left, sign, right = match.groups()
        return str(int(left) + int(right) if sign == "+" else int(left) - int(right))
    if match := re.fullmatch(r"count ([a-z]) in ([a-z]+):", question):
        return str(len(re.findall(match[1], match[2])))
    kind, word = question.split(": ")
    return "".join(reversed(word)) if kind == "reverse" else "".join(sorted(word))


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_and_shortcuts_wrong(name):
    task = TaskConfig(name=name, min_length=2, max_length=5)
    for split in ("train", "eval"):
        for index in range(200):
            made = example(task, 3, split, index)
            assert made.answer == solve(made.question)
            assert made.shortcut != made.answer
            assert set(made.question) <= set(string.ascii_lowercase + string.digits + ":+-= ")
            assert len(made.question) < 32


@pytest.mark.parametrize("name", NAMES)
def test_splits_share_no_question_whatever_the_seeds(name):
    task = TaskConfig(name=name, min_length=1, max_length=3)
    train = {example(task, seed, "train", i).question for seed in (0, 1) for i in range(600)}
    held_out = {example(task, seed, "eval", i).question for seed in (0, 1) for i in range(300)}
    assert not train & held_out
    assert all(split_of(q) == "train" for q in train)
    assert len(train) > 50


@pytest.mark.parametrize("name", NAMES)
def test_questions_differ_by_seed_and_index(name):
    task = TaskConfig(name=name, min_length=4, max_length=6)
    assert len({example(task, 0, "train", i).question for i in range(100)}) > 95
    assert [example(task, 0, "train", i) for i in range(20)] != [example(task, 1, "train", i) for i in range(20)]


def test_lengths_stay_in_range_and_reach_both_ends():
    task = TaskConfig(name="reverse", min_length=3, max_length=5)
    lengths = {len(example(task, 0, "train", i).answer) for i in range(200)}
    assert lengths == {3, 4, 5}
    numbers = [example(TaskConfig(name="arithmetic", min_length=2, max_length=3), 0, "train", i) for i in range(200)]
    digits = {len(n) for made in numbers for n in re.findall(r"\d+", made.question)}
    assert digits == {2, 3}
    assert {"+", "-"} == {made.question.strip("=0123456789") for made in numbers}


def test_another_process_makes_the_same_question():
    task = TaskConfig(name="sort")
    code = (
        "from rlhf_dist.config.schema import TaskConfig; from rlhf_dist.data.tasks import example;"
        "print([example(TaskConfig(name='sort'), 5, 'eval', i).question for i in range(20)])"
    )
    # Another hash seed: the split must not hang on Python's hash().
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "12345"}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == str([example(task, 5, "eval", i).question for i in range(20)]), done.stderr


def test_a_task_without_questions_is_refused():
    with pytest.raises(ConfigError, match=r"reverse with min_length=1 and max_length=1.*larger max_length"):
        example(TaskConfig(name="reverse", min_length=1, max_length=1), 0, "train", 0)
    with pytest.raises(ConfigError, match="min_length=5 and max_length=4"):
        example(TaskConfig(min_length=5, max_length=4), 0, "train", 0)
    with pytest.raises(ConfigError, match="train_size=0"):
        example(TaskConfig(train_size=0), 0, "train", 0)
