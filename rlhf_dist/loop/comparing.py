"""Policies that answered the same prompts: each one's responses with their scores, and what came of each pair."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from rlhf_dist.algo.head_to_head import Contest, Rating, contest, outcomes, ratings
from rlhf_dist.errors import DataError
from rlhf_dist.loop.evaluation import collected, require_some
from rlhf_dist.loop.requests import greedy as without_chance, make_requests
from rlhf_dist.loop.shell import Shell
from rlhf_dist.types import Experience, NonFinite, Prompt, Purpose, Sampling

EXAMPLES = 5
"""Of each pair and each side: the responses that it won by most."""

Key = tuple[str, int]
"""(uid of a prompt, number of the sample)."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A response and what the judge says of it."""

    text: str
    """As a person reads it: all turns of a conversation."""
    score: float
    length: int
    """Characters, so that policies with different tokenizers compare."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What one policy answered."""

    label: str
    path: str
    """As it was given."""
    responses: Mapping[Key, Judged]
    """Without those that have no finite score."""
    left_out: tuple[NonFinite, ...]
    """Those."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One policy's row."""

    label: str
    path: str
    score: float
    """Mean over its responses."""
    length: float
    """The same of their lengths, characters."""
    responses: int
    rating: Rating | None
    """None where fewer than three policies are compared: their win rate says all."""


@dataclass(frozen=True, slots=True)
class Example:
    """One response of each of two policies to a prompt, with the same seed."""

    uid: str
    sample: int
    first: Judged
    second: Judged


@dataclass(frozen=True, slots=True)
class Meeting:
    """Two policies."""

    first: str
    second: str
    contest: Contest
    """From the first one's side."""
    won: tuple[Example, ...]
    """What the first won by most, at most `EXAMPLES`."""
    lost: tuple[Example, ...]
    """What it lost by most."""


@dataclass(frozen=True, slots=True)
class HeadToHead:
    """All that is shown of a comparison."""

    standings: tuple[Standing, ...]
    meetings: tuple[Meeting, ...]
    """Of each two policies, in the order of the command line."""
    prompts: int
    samples: int
    """Sampled responses a prompt; 0: one without chance."""
    judge: str
    tie_margin: float


def labels(paths: Sequence[str]) -> list[str]:
    """Short names of the policies: their paths below the folder that they have in common."""
    plain = [os.path.normpath(path) for path in paths]
    parents = [os.path.dirname(path) for path in plain]
    kinds = {os.path.isabs(path) for path in plain}
    common = os.path.commonpath(parents) if len(kinds) == 1 and all(parents) else ""
    short = [os.path.relpath(path, common) if common else path for path in plain]
    ends = {path.endswith("/hf") for path in short}
    return [path.removesuffix("/hf") for path in short] if ends == {True} else short


def answer(
    prompts: Sequence[Prompt], samples: int, sampling: Sampling, *, seed: int, shell: Shell, judge: str
) -> tuple[dict[Key, Judged], tuple[NonFinite, ...]]:
    """`samples` responses to each prompt with the training's sampling, 0: a greedy one; with the judge's scores.

    The same `seed` gives every policy the same seeds. Second: the responses that have no finite score, and are left
    out. Raises `DataError` where no prompt could be answered, `RewardError` where that is for its rewards.
    """
    purpose: Purpose = "eval" if samples else "eval_greedy"
    requests = make_requests(prompts, purpose, max(1, samples), sampling if samples else without_chance(sampling), seed)
    found = collected(prompts, purpose, shell.evaluate(requests))
    require_some(found)
    keys = [experience.key for experience in found.experiences]
    texts = shell.texts(keys)
    shell.forget(keys)
    judged: dict[Key, Judged] = {}
    for experience, said in zip(found.experiences, texts, strict=True):
        for sample, score in scored(experience, judge).items():
            judged[experience.prompt.uid, sample] = Judged(said[sample], score, len(said[sample]))
    return judged, found.non_finite


def scored(experience: Experience, judge: str) -> dict[int, float]:
    """Sample of a group -> the judge's score, where that is finite. `judge`: name of a reward, else it is the total."""
    scores = experience.scores
    values = scores.components.get(judge, scores.total)
    pairs = zip(experience.samples.tolist(), values.tolist(), strict=True)
    return {sample: score for sample, score in pairs if math.isfinite(score)}


def compare(
    policies: Sequence[Policy], prompts: int, samples: int, *, judge: str, tie_margin: float, seed: int
) -> HeadToHead:
    """Each two policies, response by response: the i-th of one to a prompt against the i-th of the other.

    `seed` is for the intervals of ratings. Raises `DataError` where two policies share no scored response.
    """
    meetings, battles = [], []
    for first, second in combinations(policies, 2):
        shared = [key for key in first.responses if key in second.responses]
        if not shared:
            raise DataError(f"{first.label} and {second.label}: no prompt has a scored response of both")
        ours, theirs = ([one.responses[key] for key in shared] for one in (first, second))
        outcome = outcomes_of(ours, theirs, tie_margin)
        places = {uid: place for place, uid in enumerate(dict.fromkeys(uid for uid, _ in shared))}
        prompt = torch.tensor([places[uid] for uid, _ in shared])
        longer = torch.tensor([a.length - b.length for a, b in zip(ours, theirs, strict=True)])
        won, lost = largest(shared, ours, theirs, outcome)
        meetings.append(Meeting(first.label, second.label, contest(outcome, longer, prompt), won, lost))
        numbers = (number_of(uid) for uid, _ in shared)
        battles += [(n, first.label, second.label, o) for n, o in zip(numbers, outcome.tolist(), strict=True)]
    rated = ratings(battles, seed) if len(policies) > 2 else {}
    return HeadToHead(
        tuple(standing(policy, rated.get(policy.label)) for policy in policies),
        tuple(meetings),
        prompts,
        samples,
        judge,
        tie_margin,
    )


def outcomes_of(ours: Sequence[Judged], theirs: Sequence[Judged], margin: float) -> torch.Tensor:
    """float64 [N]; the same text twice is a tie, whatever a judge that is not exact makes of it."""
    scores = [torch.tensor([one.score for one in side], dtype=torch.float64) for side in (ours, theirs)]
    same = torch.tensor([a.text == b.text for a, b in zip(ours, theirs, strict=True)])
    return outcomes(scores[0], scores[1], margin).masked_fill(same, 0.5)


def largest(
    keys: Sequence[Key], ours: Sequence[Judged], theirs: Sequence[Judged], outcome: torch.Tensor
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """What the first policy won by most, and what it lost by most; of a prompt only one sample."""
    rows = [Example(uid, sample, a, b) for (uid, sample), a, b in zip(keys, ours, theirs, strict=True)]
    decided = [row for row, one in zip(rows, outcome.tolist(), strict=True) if one != 0.5]
    decided.sort(key=lambda row: row.second.score - row.first.score)
    sides = []
    for sign, ordered in ((1, decided), (-1, decided[::-1])):
        one_each: dict[str, Example] = {}
        for row in ordered:
            if sign * (row.first.score - row.second.score) > 0:
                one_each.setdefault(row.uid, row)
        sides.append(tuple(one_each.values())[:EXAMPLES])
    return sides[0], sides[1]


def standing(policy: Policy, rating: Rating | None) -> Standing:
    """Its row."""
    found = policy.responses.values()
    score = math.fsum(one.score for one in found) / len(found)
    length = sum(one.length for one in found) / len(found)
    return Standing(policy.label, policy.path, score, length, len(found), rating)


def number_of(uid: str) -> int:
    """Of a held-out prompt, `eval/INDEX`."""
    return int(uid.rpartition("/")[2])
