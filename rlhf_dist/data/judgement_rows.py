"""What a row of preference data says: which response is better, or how good one is. Complaints start with its place."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations
from typing import Literal, NoReturn

from rlhf_dist.config.schema import DataConfig, PreferencesConfig
from rlhf_dist.data.records import Row, shown
from rlhf_dist.data.rows import ask, behind_system, checked_text, conversation, text_field, value_of
from rlhf_dist.errors import DataError
from rlhf_dist.types import Message

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
"""Who speaks after a mark in a conversation that is one text, as HH-RLHF has it."""
LINE_END = re.compile(r"\r\n?")
"""Of Windows and of old Macs; a transcript's are read as LF."""
MARK = re.compile(rf"(?:\A\s*|\n\n)({'|'.join(SPEAKERS)}):")
LARGEST_MARGIN = 1e30
"""The sum of a batch's losses stays within float32."""
THUMBS = {"up": 1.0, "down": 0.0}
SIDES = ("chosen_key", "rejected_key")
"""Of `preferences`: they name the columns of the two sides."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One response was called better than another."""

    better: int
    """Index into the comparison's responses."""
    worse: int
    """Another one."""
    margin: float
    """How much better at least, in the unit of scores; 0 when nothing is known."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Responses to one prompt and the order that a judge saw among them."""

    place: str
    """Where it came from, for messages: `file:line`, or a task's split and index."""
    messages: tuple[Message, ...]
    """The prompt; ends with a user turn."""
    responses: tuple[str, ...]
    """At least two; none empty, no two alike."""
    pairs: tuple[Pair, ...]
    """At least one; all pairs of a ranking."""


@dataclass(frozen=True, slots=True)
class Rating:
    """How good one response was called."""

    place: str
    """Where it came from, for messages."""
    messages: tuple[Message, ...]
    """The prompt; ends with a user turn."""
    response: str
    """Never empty."""
    value: float
    """regression: the score to come close to; logistic: 1 for thumbs up, 0 for down."""
    kind: Literal["regression", "logistic"]


Judgement = Comparison | Rating


class NoJudgement(DataError):
    """A row that is written as it should be, but from which nothing can be learnt."""


def judgement(row: Row, preferences: PreferencesConfig, data: DataConfig) -> Judgement:
    """What a row says by itself: every form but `battles`.

    Raises NoJudgement for an empty response, sides that are equal or share no prompt, a ranking with ties or one
    entry; DataError for whatever else is wrong. The message has the place, what is wrong and what would be right.
    """
    if preferences.form == "pair":
        return _pair(row, preferences, data)
    if preferences.form == "transcripts":
        return _transcripts(row, preferences, data)
    if preferences.form == "ranking":
        return _ranking(row, preferences, data)
    assert preferences.form in ("rating", "thumbs"), preferences.form
    messages = prompt(row, preferences, data)
    key = preferences.response_key
    said = response(row, repr(key), column(row, key, "response_key"))
    if preferences.form == "thumbs":
        return Rating(row.place, messages, said, _thumbs(row, preferences.rating_key), "logistic")
    return Rating(row.place, messages, said, _rating(row, preferences), "regression")


def prompt(row: Row, preferences: PreferencesConfig, data: DataConfig) -> tuple[Message, ...]:
    """The conversation in `prompt_key`, a text or a list of {role, content}, behind `data.system`. Raises DataError."""
    key = preferences.prompt_key
    if not isinstance(row.fields.get(key), list):
        return ask(text_field(row, key, hint=_named_by("prompt_key")), data.system)
    messages = conversation(row, key)
    if messages[-1].role != "user":
        raise DataError(
            f"{row.place}: {key!r} ends with a turn of {messages[-1].role!r}; a prompt has to end with a user turn"
        )
    return behind_system(row, key, messages, data.system)


def response(row: Row, name: str, value: object) -> str:
    """`value`, when it can be a response; `name` says what it is. Raises NoJudgement when it is empty, or DataError."""
    if isinstance(value, str) and not value.strip():
        raise NoJudgement(f"{row.place}: {name} is empty; a response has to be some text")
    return checked_text(row, name, value)


def responses(row: Row, key: str) -> tuple[str, ...]:
    """The list of texts in `responses_key`, no two alike. Raises NoJudgement for equal or empty ones, DataError."""
    value = column(row, key, "responses_key")
    if not isinstance(value, list):
        raise DataError(f"{row.place}: {key!r} is {shown(value)}; it has to be a list of texts")
    texts = tuple(response(row, f"{key}[{i}]", item) for i, item in enumerate(value))
    for (i, one), (j, other) in combinations(enumerate(texts), 2):
        if one == other:
            raise NoJudgement(
                f"{row.place}: {key}[{i}] and {key}[{j}] are equal, {shown(one)}; responses that are compared have to "
                "differ"
            )
    return texts


def column(row: Row, key: str, setting: str) -> object:
    """What is in the column `key`, which `preferences.SETTING` names. Raises DataError when there is nothing."""
    return value_of(row, key, hint=_named_by(setting))


def _named_by(setting: str) -> str:
    return f"preferences.{setting}; name the column that has it"


def _pair(row: Row, preferences: PreferencesConfig, data: DataConfig) -> Comparison:
    messages = prompt(row, preferences, data)
    keys = (preferences.chosen_key, preferences.rejected_key)
    chosen, rejected = (
        response(row, repr(key), column(row, key, setting)) for key, setting in zip(keys, SIDES, strict=True)
    )
    if chosen == rejected:
        _equal_sides(row, keys)
    return Comparison(row.place, messages, (chosen, rejected), (Pair(0, 1, _margin(row, preferences)),))


def _transcripts(row: Row, preferences: PreferencesConfig, data: DataConfig) -> Comparison:
    keys = (preferences.chosen_key, preferences.rejected_key)
    chosen, rejected = (_transcript(row, key, setting) for key, setting in zip(keys, SIDES, strict=True))
    if chosen == rejected:
        _equal_sides(row, keys)
    shared = _shared(chosen, rejected)
    if not any(turn.role == "user" for turn in shared):
        raise NoJudgement(
            f"{row.place}: {keys[0]!r} and {keys[1]!r} share no prompt (turn {len(shared) + 1} of {len(chosen)} and "
            f"{len(rejected)} differs); two sides have to be the same conversation but for its closing assistant turn"
        )
    if shared[-1].role != "user":
        raise NoJudgement(
            f"{row.place}: the {len(shared)} turns that {keys[0]!r} and {keys[1]!r} share end with a turn of "
            f"{shared[-1].role!r}; a prompt has to end with a user turn"
        )
    for key, turns in zip(keys, (chosen, rejected), strict=True):
        if len(turns) != len(shared) + 1 or turns[-1].role != "assistant":
            roles = ", ".join(turn.role for turn in turns[len(shared) :]) or "nothing"
            raise NoJudgement(
                f"{row.place}: after the {len(shared)} turns that both sides share, {key!r} goes on with {roles}; "
                "it has to be one closing assistant turn"
            )
    messages = behind_system(row, keys[0], shared, data.system)
    sides = (chosen[-1].content, rejected[-1].content)
    return Comparison(row.place, messages, sides, (Pair(0, 1, _margin(row, preferences)),))


def _equal_sides(row: Row, keys: tuple[str, str]) -> NoReturn:
    raise NoJudgement(f"{row.place}: {keys[0]!r} and {keys[1]!r} are equal; a comparison needs two different sides")


def _shared(one: tuple[Message, ...], other: tuple[Message, ...]) -> tuple[Message, ...]:
    """The longest common beginning."""
    pairs = zip(one, other, strict=False)
    count = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))
    return one[:count]


def _transcript(row: Row, key: str, setting: str) -> tuple[Message, ...]:
    """The turns of a whole conversation, none of them empty. Raises NoJudgement when the closing one is, DataError."""
    value, closing = column(row, key, setting), f"the closing turn of {key!r}"
    if isinstance(value, list):
        if value and isinstance(value[-1], dict):
            response(row, closing, value[-1].get("content"))
        return conversation(row, key)
    turns = _marked_turns(row, key, text_field(row, key))
    for number, turn in enumerate(turns[:-1], 1):
        checked_text(row, f"turn {number} of {key!r}", turn.content)
    response(row, closing, turns[-1].content)
    return turns


def _marked_turns(row: Row, key: str, text: str) -> tuple[Message, ...]:
    """The turns of HH-RLHF's form, white space around each left out.

    A mark begins a turn when the other one spoke before. Within a speaker's own turn it is part of the text: a few
    real responses hold one.
    """
    before, *pieces = MARK.split(LINE_END.sub("\n", text.removeprefix("\ufeff")))
    if before.strip() or not pieces:
        raise DataError(
            f"{row.place}: {key!r} begins with {shown(text[:40])}; a conversation has to begin with 'Human:', with "
            "turns of 'Human:' and 'Assistant:' after an empty line each, or be a list of {role, content}"
        )
    turns: list[tuple[str, str]] = []
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        if turns and turns[-1][0] == speaker:
            said = f"{turns.pop()[1]}\n\n{speaker}:{said}"
        turns.append((speaker, said))
    return tuple(Message(SPEAKERS[speaker], said.strip()) for speaker, said in turns)


def _ranking(row: Row, preferences: PreferencesConfig, data: DataConfig) -> Comparison:
    key = preferences.ranks_key
    messages, texts = prompt(row, preferences, data), responses(row, preferences.responses_key)
    ranks = column(row, key, "ranks_key")
    if len(texts) < 2:
        raise NoJudgement(
            f"{row.place}: {preferences.responses_key!r} has {len(texts)} entries; a ranking needs at least 2"
        )
    if not isinstance(ranks, list) or len(ranks) != len(texts):
        raise DataError(
            f"{row.place}: {key!r} is {shown(ranks)}; it has to be a list of {len(texts)} ranks, one for each response"
        )
    numbers = [number(row, f"{key}[{i}]", rank) for i, rank in enumerate(ranks)]
    tied = next((rank for rank in numbers if numbers.count(rank) > 1), None)
    if tied is not None:
        raise NoJudgement(
            f"{row.place}: {key!r} is {shown(ranks)} with rank {tied:g} twice; a ranking may have no ties"
        )
    if sorted(numbers) != list(range(1, len(texts) + 1)):
        raise DataError(f"{row.place}: {key!r} is {shown(ranks)}; it has to be 1 (the best) to {len(texts)}, each once")
    best_first = sorted(range(len(texts)), key=numbers.__getitem__)
    pairs = tuple(Pair(better, worse, 0.0) for better, worse in combinations(best_first, 2))
    return Comparison(row.place, messages, texts, pairs)


def _margin(row: Row, preferences: PreferencesConfig) -> float:
    key = preferences.margin_key
    if not key:
        return 0.0
    margin = number(row, repr(key), column(row, key, "margin_key"))
    if margin < 0:
        raise DataError(f"{row.place}: {key!r} is {margin:g}; a margin has to be 0 or more")
    if margin > LARGEST_MARGIN:
        raise DataError(
            f"{row.place}: {key!r} is {margin:g}; a margin, in the unit of scores, has to be at most "
            f"{LARGEST_MARGIN:g}, so that losses stay within float32"
        )
    return margin


def _rating(row: Row, preferences: PreferencesConfig) -> float:
    """The rating on a scale of -1 to 1."""
    key, low, high = preferences.rating_key, preferences.rating_min, preferences.rating_max
    rating = number(row, repr(key), column(row, key, "rating_key"))
    if not low <= rating <= high:
        raise DataError(
            f"{row.place}: {key!r} is {rating:g}; it has to be from {low:g} to {high:g}; correct the row, or set "
            "preferences.rating_min and preferences.rating_max to the scale"
        )
    return 2 * (rating - low) / (high - low) - 1


def _thumbs(row: Row, key: str) -> float:
    value = column(row, key, "rating_key")
    if isinstance(value, str) and value in THUMBS:
        return THUMBS[value]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return float(value)
    raise DataError(f"{row.place}: {key!r} is {shown(value)}; it has to be true or false, 1 or 0, 'up' or 'down'")


def number(row: Row, name: str, value: object) -> float:
    """`value`, when it is a finite number and no bool; `name` says what it is. Raises DataError."""
    kind = "a number"
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        kind = "a finite number that a float can hold"
        try:
            found = float(value)
        except OverflowError:  # JSON sets whole numbers no limit
            found = math.inf
        if math.isfinite(found):
            return found
    raise DataError(f"{row.place}: {name} is {shown(value)}; it has to be {kind}")
