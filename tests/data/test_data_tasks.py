import re
import string
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.config.schema import DataConfig, SftConfig, TaskConfig
from rlhf_dist.data.demonstrations import demonstrations, held_out_demonstrations
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.data.tasks import TASKS, example, split_of
from rlhf_dist.errors import ConfigError
from rlhf_dist.types import Message, Prompt

NAMES = ("arithmetic", "sums", "reverse", "sort", "count")
GUESS = TaskConfig(name="guess", min_length=1, max_length=3, train_size=300)


def solve(question: str) -> str:
    """Another way to the answer than the one under test."""
    if match := re.fullmatch(r"(\d+)([+-])(\d+)=", question):
        left, sign, right = match.groups()
        return str(int(left) + int(right) if sign == "+" else int(left) - int(right))
    if match := re.fullmatch(r"What is (\d+) plus (\d+)\?", question):
        return str(int(match[1]) + int(match[2]))
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
            assert set(made.question) <= set(string.ascii_lowercase + string.digits + ":+-= W?")
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


def asked(answer: str) -> Prompt:
    return Prompt("0/0", (Message("system", "x"), Message("user", "guess: ab c ba")), answer, "guess")


@pytest.mark.parametrize(
    ("answer", "responses", "seen"),
    [
        ("c", ["ab"], "right"),
        ("c", ["ba"], "left"),
        ("ab", [" c\n"], "left"),
        ("ba", ["c"], "right"),
        ("c", ["a"], "none"),
        ("c", [""], "none"),
        ("c", ["guess:"], "none"),
        ("c", [" c"], None),
        ("c", ["ab", "ba"], None),
    ],
)
def test_the_hint_of_a_guess(answer: str, responses: list[str], seen: str | None) -> None:
    assert TASKS["guess"].observe(asked(answer), responses) == seen


def guesses(first: int, use_hint: bool) -> float:
    """Share of training questions that a player wins who tries word number `first`, then what the hint leaves."""
    won = 0
    prompts = PromptStream(DataConfig(task=GUESS), 0, 8).take(GUESS.train_size)
    for prompt in prompts:
        words = prompt.messages[-1].content.split()[1:]
        said = [words[first]]
        seen = TASKS[prompt.source].observe(prompt, said)
        if seen is not None:
            left = words[:first] if seen == "left" else words[first + 1 :]
            said.append(left[0] if use_hint else said[0])
        assert TASKS[prompt.source].observe(prompt, said) is None, "two turns at most"
        won += said[-1] == prompt.answer
    return won / len(prompts)


def test_a_guess_needs_both_turns() -> None:
    assert guesses(1, use_hint=True) == 1.0
    assert guesses(0, use_hint=True) == pytest.approx(2 / 3, abs=0.08)
    assert guesses(2, use_hint=True) == pytest.approx(2 / 3, abs=0.08)
    assert guesses(1, use_hint=False) == pytest.approx(1 / 3, abs=0.08)


@given(st.integers(0, 10**6), st.sampled_from(["train", "eval"]))
def test_a_guess_is_one_of_three_words_and_the_same_again(index, split):
    made = example(GUESS, 3, split, index)
    assert made == example(GUESS, 3, split, index) and split_of(made.question) == split
    assert made.question == "guess: " + " ".join(made.tries)
    assert len(set(made.tries)) == 3 and {made.answer, made.shortcut} < set(made.tries) and made.answer != made.shortcut
    assert all(1 <= len(word) <= 3 for word in made.tries)


def test_demonstrations_of_a_guess_show_both_turns() -> None:
    data = DataConfig(task=GUESS, system="be quick")
    shown = demonstrations(data, SftConfig(wrong_share=0.5), 0, 8)
    assert list(shown) == list(demonstrations(data, SftConfig(wrong_share=0.5), 0, 8))
    places, right = Counter(), Counter()
    for index, made in enumerate(shown):
        question = example(GUESS, 0, "train", index)
        assert made.messages[:2] == (Message("system", "be quick"), Message("user", question.question))
        if len(made.messages) == 2:
            places[question.tries.index(made.response)] += 1
            continue
        tried, seen = made.messages[2:]
        assert (tried.role, seen.role) == ("assistant", "user") and tried.content != question.answer
        assert seen.content == TASKS["guess"].observe(asked_as(made.messages[:2], question.answer), [tried.content])
        right[made.response == question.answer] += 1
    assert min(places.values()) > 40 and len(places) == 3, "no word is preferred"
    assert right.total() > 60 and right[True] / right.total() == pytest.approx(0.5, abs=0.15)
    held_out = held_out_demonstrations(data, SftConfig(), 50)
    later = [(i, made.response) for i, made in enumerate(held_out) if len(made.messages) == 4]
    assert later and all(response == example(GUESS, 0, "eval", i).answer for i, response in later)


def asked_as(messages: tuple[Message, ...], answer: str) -> Prompt:
    return Prompt("0/0", messages, answer, "guess")


@pytest.mark.parametrize("name", [name for name in TASKS if name != "guess"])
def test_the_other_tasks_have_one_turn(name):
    assert TASKS[name].observe(asked("c"), ["ab"]) is None and example(TaskConfig(name=name), 0, "train", 0).tries == ()
