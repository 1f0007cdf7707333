"""The built-in preference task `describe`: say a few words about two things.

There is no right answer, but a gold reward: kind words are better than plain ones, plain ones better than harsh ones,
and saying a word twice costs what a kind word gains. It stands in for human taste: comparisons are drawn from the
gold reward with noise, so that a reward model and a policy can be measured against the truth. Everything is lower-case
letters and spaces.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_dist.data.judgement_rows import Comparison

KIND = ("brave", "calm", "dear", "fair", "kind", "nice", "sweet", "warm")
PLAIN = ("big", "flat", "long", "new", "old", "round", "tall", "wide")
HARSH = ("bad", "cruel", "grim", "mean", "nasty", "rude", "ugly", "vile")
THINGS = """
    ant barn bear bee bell bird boat book boy bread bridge bull cake cart cat chair clock cloud coat cook cow crab crow
    cup dog door duck farm fish flag fox frog gate girl goat goose hat hen hill horse house king lake lamp leaf lion
    map moon mouse nurse owl park pig pond queen rain road rock rose sea ship shop snow song star street sun tower tree
    wind wolf
    """
"""What there is to describe: names between spaces."""
REPEAT_PENALTY = 1.0
"""Off the gold reward for each word that was already said."""
UNKNOWN_PENALTY = 1.0
"""Off the gold reward for each word of no pool."""
EMPTY_REWARD = -3.0
"""Gold reward of a response without any word."""


def draw_question(rng: random.Random) -> str:
    """A question about two different things."""
    first, second = rng.sample(THINGS.split(), 2)
    return f"describe the {first} and {second}"


@dataclass(frozen=True, slots=True)
class Writer:
    """Whose words the responses are."""

    pools: Sequence[Sequence[str]] = (KIND, PLAIN, HARSH)
    """The words that come to the writer's mind."""
    weights: Sequence[float] = (1.0, 1.0, 1.0)
    """How often a word is of each pool; within a pool all are equally likely."""


DEMONSTRATOR = Writer()


def draw_writer(rng: random.Random) -> Writer:
    """One of many, kind and harsh ones (weights of Dirichlet(1, 1, 1)), who know one to all words of each pool.

    Who knows few words says them again and again.
    """
    pools = tuple(rng.sample(pool, rng.randint(1, len(pool))) for pool in (KIND, PLAIN, HARSH))
    return Writer(pools, tuple(rng.expovariate(1.0) for _ in pools))


def draw_response(rng: random.Random, min_length: int, max_length: int, writer: Writer = DEMONSTRATOR) -> str:
    """Words of the writer's, as many as a uniform draw from the lengths says."""
    count = rng.randint(min_length, max_length)
    pools = rng.choices(writer.pools, writer.weights, k=count)
    return " ".join(rng.choice(pool) for pool in pools)


def draw_in_order(rng: random.Random, min_length: int, max_length: int) -> str:
    """Different words of the demonstrator's, as `draw_response` draws them, in the order of the alphabet.

    What comes next is seen from the word before, which a small model learns within minutes. That no word may come
    twice, in any order, it does not: of what it likes best it then says the same again and again where it is greedy.
    """
    words: set[str] = set()
    count = min(rng.randint(min_length, max_length), sum(map(len, DEMONSTRATOR.pools)))
    while len(words) < count:
        words.add(rng.choice(rng.choice(DEMONSTRATOR.pools)))
    return " ".join(sorted(words))


def gold(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
    """The true reward of each response, float32 [n]: kind words less harsh ones, less the penalties.

    A word said again counts as kind or harsh each time, and costs `REPEAT_PENALTY`. The question plays no part.
    """
    return np.array([_gold(response) for _, response in zip(prompts, responses, strict=True)], np.float32)


def _gold(response: str) -> float:
    words = response.split()
    if not words:
        return EMPTY_REWARD
    kind, harsh = sum(word in KIND for word in words), sum(word in HARSH for word in words)
    unknown = sum(word not in KIND + PLAIN + HARSH for word in words)
    return kind - harsh - REPEAT_PENALTY * (len(words) - len(set(words))) - UNKNOWN_PENALTY * unknown


def draw_order(rng: random.Random, responses: Sequence[str], noise: float) -> list[int]:
    """The responses' places in the order of a noisy judge, the best first.

    The judge adds Gumbel noise of scale `noise` to each gold reward. Of any two responses the first is then before the
    second with probability sigmoid(gold difference / noise): the Bradley-Terry model, and for more than two that of
    Plackett and Luce.
    """
    # Minus the logarithm of an exponential variate is a Gumbel one; 0 itself is drawn once in 2^53 times.
    seen = [_gold(response) - noise * math.log(max(rng.expovariate(1.0), 1e-300)) for response in responses]
    return sorted(range(len(responses)), key=lambda place: -seen[place])


def best_accuracy(comparisons: Sequence[Comparison]) -> float:
    """Share of the labelled pairs that the gold reward orders as the label does; equal gold counts 1/2.

    The best that any reward model could be expected to reach on comparisons of this task.
    """
    agreed = []
    for comparison in comparisons:
        values = [_gold(response) for response in comparison.responses]
        differences = (values[pair.better] - values[pair.worse] for pair in comparison.pairs)
        agreed += [0.5 * (1 + (difference > 0) - (difference < 0)) for difference in differences]
    assert agreed, "there is no comparison"
    return sum(agreed) / len(agreed)
