"""What people judge: one item is a prompt with the responses that one decision is about."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

from rlhf_dist.labels.verdicts import MOST_RANKED, Judge, Verdict, gold_verdict
from rlhf_dist.types import Message


@dataclass(frozen=True, slots=True)
class Answered:
    """A prompt and responses to it, as a file or a run has them."""

    place: str
    """`file:line` or `file: row N`."""
    messages: tuple[Message, ...]
    """The prompt; ends with a user turn."""
    responses: tuple[str, ...]
    """At least one; none empty."""
    models: tuple[str, ...]
    """Who wrote each, with its version; empty text where that is not known. Never shown to labellers."""
    gold: tuple[float, ...] | None
    """How good each is, where that is known beyond doubt; see `gold_verdict`."""


@dataclass(frozen=True, slots=True)
class Item:
    """One decision to be made."""

    judge: Judge
    messages: tuple[Message, ...]
    """The prompt; ends with a user turn."""
    responses: tuple[str, ...]
    """pair: two; ranking: 2 to 9; stars, thumbs: one. No two alike."""
    models: tuple[str, ...]
    """One for each response."""
    gold: Verdict | None
    """What is right, for an item that tests the labeller."""
    place: str
    """Where it came from."""

    def digest(self) -> bytes:
        """The same for the same question, whatever the order of its responses: it is not asked twice."""
        turns = [[turn.role, turn.content] for turn in self.messages]
        texts = sorted(self.responses)
        return hashlib.sha256(json.dumps([self.judge, turns, texts]).encode()).digest()


PAIRS = 3
"""Of the responses to one prompt, unless more are asked for."""


def items_of(
    answered: Iterable[Answered], judge: Judge, gold: bool, pairs: int = PAIRS
) -> tuple[list[Item], Counter[str]]:
    """The decisions to be made, and how many responses or pairs were left out for which reason.

    pair: so many pairs of responses to a prompt as `pairs` says; ranking: all of them in one item; stars, thumbs: each
    by itself. Single responses to the same prompt are put together for the first two. The first item of each prompt
    comes before the second of any. `gold`: the items test the labeller.
    """
    left_out: Counter[str] = Counter()
    together = _grouped(answered) if judge in ("pair", "ranking") else answered
    of_prompts: list[list[Item]] = []
    for one in together:
        parts = list(_parts(one, judge, pairs, left_out))
        of_prompts.append(parts if not gold else [part for part in parts if _has_gold(part, left_out)])
    items = [item for turn in zip_longest(*of_prompts) for item in turn if item is not None]
    return (items if gold else [replace(item, gold=None) for item in items]), left_out


def _has_gold(item: Item, left_out: Counter[str]) -> bool:
    if item.gold is None:
        left_out["no right answer is known (gold)"] += 1
    return item.gold is not None


def _grouped(answered: Iterable[Answered]) -> Iterator[Answered]:
    """Single responses to one prompt as one, in the order of the first of each."""
    single: dict[tuple[Message, ...], list[Answered]] = {}
    for one in answered:
        if len(one.responses) > 1:
            yield one
        else:
            single.setdefault(one.messages, []).append(one)
    for messages, ones in single.items():
        gold = [value for one in ones for value in one.gold or ()]
        yield Answered(
            place=ones[0].place,
            messages=messages,
            responses=tuple(one.responses[0] for one in ones),
            models=tuple(one.models[0] for one in ones),
            gold=tuple(gold) if len(gold) == len(ones) else None,
        )


def _parts(one: Answered, judge: Judge, pairs: int, left_out: Counter[str]) -> Iterator[Item]:
    if judge in ("stars", "thumbs"):
        for index in range(len(one.responses)):
            yield _item(one, judge, (index,))
        return
    first = {text: index for index, text in reversed(list(enumerate(one.responses)))}
    different = sorted(first.values())
    if len(one.responses) > len(different):
        left_out["equal to another response to the same prompt"] += len(one.responses) - len(different)
    if len(different) < 2:
        left_out["the only response to its prompt"] += 1
    elif judge == "pair":
        yield from (
            _item(one, judge, pair) for pair in chosen_pairs([one.models[i] for i in different], pairs, different)
        )
        beyond = len(different) * (len(different) - 1) // 2 - pairs
        if beyond > 0:
            left_out[f"more than {pairs} pairs of a prompt (--pairs-per-prompt)"] += beyond
    elif len(different) > MOST_RANKED:
        left_out[f"more than {MOST_RANKED} responses to one prompt"] += 1
    else:
        yield _item(one, judge, different)


def chosen_pairs(models: Sequence[str], most: int, names: Sequence[int]) -> list[tuple[int, int]]:
    """At most `most` pairs of responses, those of two models first, and each response as seldom as can be.

    models: who wrote each response. names: what stands for each in the pairs, ascending. The same call gives the same.
    """
    of_model: defaultdict[str, list[int]] = defaultdict(list)
    for place, model in enumerate(models):
        of_model[model].append(place)
    # The models in turn. Then neighbours, 1 apart, then 2 apart, ...: the first ones share as few responses as can be.
    row = [place for turn in zip_longest(*of_model.values()) for place in turn if place is not None]
    found: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for apart in range(1, len(row)):
        for start in [*range(0, len(row) - apart, 2), *range(1, len(row) - apart, 2)]:
            one, other = sorted((row[start], row[start + apart]))
            across = models[one] != models[other]
            if len(found[across]) < most:
                found[across].append((one, other))
        if len(found[len(of_model) > 1]) >= most:
            break
    return [(names[a], names[b]) for a, b in sorted((found[True] + found[False])[:most])]


def _item(one: Answered, judge: Judge, chosen: Sequence[int]) -> Item:
    gold = gold_verdict(judge, [one.gold[i] for i in chosen]) if one.gold else None
    texts, models = (tuple(values[i] for i in chosen) for values in (one.responses, one.models))
    return Item(judge, one.messages, texts, models, gold, one.place)
