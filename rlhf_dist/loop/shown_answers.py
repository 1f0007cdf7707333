"""A run's `answers/`: what its model said to held-out prompts before training and after, for people to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_dist.errors import DataError, DiskError
from rlhf_dist.loop.run_directory import write_text
from rlhf_dist.loop.shell import Shell
from rlhf_dist.loop.state import state_of
from rlhf_dist.models.guarded_files import read_json
from rlhf_dist.types import DroppedPrompt, Experience, Prompt

FOLDER = "answers"
BEFORE, AFTER = "before.json", "after.json"
RECORDED = 32
"""Held-out prompts, the first ones, whose answers an evaluation hands back."""
LONGEST = 2000
"""Characters of a text that is kept."""


@dataclass(frozen=True, slots=True)
class Said:
    """One response."""

    text: str
    reward: float | None
    """Total; None where it is not finite."""
    gold: float | None = None
    """Of the reward that `scoring.gold` names; None without one."""


@dataclass(frozen=True, slots=True)
class ShownAnswer:
    """What one held-out prompt was answered."""

    prompt: str
    """Its last message."""
    greedy: Said | None
    """None where the prompt was dropped."""
    sample: Said | None = None
    """The first one that was sampled as in training; None without `eval.samples`."""
    dropped: str = ""
    """Why there is no answer."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers of one evaluation."""

    step: int
    rows: tuple[ShownAnswer, ...]


def answers_to(
    prompts: Sequence[Prompt],
    greedy: Sequence[Experience],
    sampled: Sequence[Experience],
    dropped: Sequence[DroppedPrompt],
    gold: str,
    shell: Shell,
) -> tuple[ShownAnswer, ...]:
    """The greedy and the first sampled response to each of the first `RECORDED` prompts, with their scores."""
    asked = prompts[:RECORDED]
    reasons = {drop.uid: f"(dropped: {drop.reason})" for drop in dropped}
    greedily, by_chance = (_said(asked, found, gold, shell) for found in (greedy, sampled))
    return tuple(
        ShownAnswer(
            prompt.messages[-1].content,
            greedily.get(prompt.uid),
            by_chance.get(prompt.uid),
            "" if prompt.uid in greedily else reasons[prompt.uid],
        )
        for prompt in asked
    )


def _said(asked: Sequence[Prompt], found: Sequence[Experience], gold: str, shell: Shell) -> Mapping[str, Said]:
    """By the prompt's uid: the first sample that is left."""
    by_uid = {experience.prompt.uid: experience for experience in found}
    there = [by_uid[prompt.uid] for prompt in asked if prompt.uid in by_uid]
    texts = shell.texts([experience.key for experience in there])
    return {
        one.prompt.uid: Said(
            said[int(one.samples[0])],
            _finite(one.scores.total[0]),
            _finite(one.scores.components[gold][0]) if gold else None,
        )
        for one, said in zip(there, texts, strict=True)
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def keep_answers(run: Path, step: int, rows: Sequence[ShownAnswer]) -> None:
    """Write those of the first evaluation, or replace those of the one before. Raises DiskError."""
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made: {error.strerror}") from error
    kept = {"step": step, "rows": [_cut(asdict(row)) for row in rows]}
    write_text(folder / (AFTER if step else BEFORE), json.dumps(kept, ensure_ascii=False, indent=1) + "\n")


def _cut(value: object) -> object:
    """Every text in it at most `LONGEST` characters long, with a mark where it was longer."""
    if isinstance(value, dict):
        return {name: _cut(inner) for name, inner in value.items()}
    if isinstance(value, str) and len(value) > LONGEST:
        return f"{value[:LONGEST]} (and {len(value) - LONGEST:,} more characters)"
    return value


def read_answers(run: Path, name: str) -> Answers:
    """`BEFORE` or `AFTER` of a run directory. Raises DataError naming the file."""
    path = run / FOLDER / name
    found = read_json(path)
    try:
        rows = tuple(state_of(ShownAnswer, dict(row), path) for row in found["rows"][:RECORDED])
        return Answers(int(found["step"]), rows)
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: does not hold the answers of an evaluation") from error
