"""Head-to-head results between responses to the same prompt, made into ratings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rlhf_dist.algo.preference import elo_ratings, elo_to_score
from rlhf_dist.config.schema import DataConfig, PreferencesConfig
from rlhf_dist.data.judgement_rows import Rating, column, prompt, responses
from rlhf_dist.data.records import Row, shown
from rlhf_dist.errors import DataError
from rlhf_dist.types import Message

TIE = "tie"


@dataclass(frozen=True, slots=True)
class Battle:
    """Two responses met."""

    place: str
    """Where it came from, for messages."""
    messages: tuple[Message, ...]
    """The prompt; ends with a user turn."""
    responses: tuple[str, ...]
    """Two, different from each other."""
    outcome: float
    """1: the first won, 0: the second, 0.5: a tie."""


def battle(row: Row, preferences: PreferencesConfig, data: DataConfig) -> Battle:
    """The battle of a row. Raises NoJudgement for equal or empty responses, DataError for what else is wrong."""
    messages, texts = prompt(row, preferences, data), responses(row, preferences.responses_key)
    if len(texts) != 2:
        raise DataError(
            f"{row.place}: {preferences.responses_key!r} has {len(texts)} entries; a battle is between 2 "
            "(preferences.form ranking takes more)"
        )
    key = preferences.winner_key
    winner = column(row, key, "winner_key")
    if winner == TIE:
        return Battle(row.place, messages, texts, 0.5)
    if isinstance(winner, bool) or winner not in (0, 1):
        raise DataError(
            f"{row.place}: {key!r} is {shown(winner)}; it has to be 0 or 1, the place of the winner, or 'tie'"
        )
    return Battle(row.place, messages, texts, 1.0 - winner)


def elo_judgements(battles: Iterable[Battle]) -> list[list[Rating]]:
    """For each prompt, in the order of the file, its responses with their Elo ratings on the Bradley-Terry scale.

    Ratings of different prompts have nothing to do with each other: each prompt's responses start equal and meet only
    each other, and their mean is 0.
    """
    prompts: dict[tuple[Message, ...], list[Battle]] = {}
    for one in battles:
        prompts.setdefault(one.messages, []).append(one)
    return [_ratings(messages, met) for messages, met in prompts.items()]


def _ratings(messages: tuple[Message, ...], met: list[Battle]) -> list[Rating]:
    ratings = elo_ratings((one.responses[0], one.responses[1], one.outcome) for one in met)
    places = {text: one.place for one in reversed(met) for text in one.responses}  # the first of each
    return [
        Rating(places[text], messages, text, elo_to_score(rating), "regression") for text, rating in ratings.items()
    ]
