"""Texts that say nothing to a model: without a token, or with the same tokens as the other side of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from typing import TYPE_CHECKING

from rlhf_dist.data.judgement_rows import Comparison, Judgement
from rlhf_dist.data.judgements import WAY_OUT, FileJudgements, Judgements, Unusable
from rlhf_dist.data.records import listed, shown
from rlhf_dist.data.render import render
from rlhf_dist.data.text_checks import RowTexts
from rlhf_dist.errors import DataError
from rlhf_dist.models.text_format import text_format
from rlhf_dist.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESPONSE = "the response"
CHUNK = 1000
"""Texts tokenised by one call."""


@dataclass(frozen=True, slots=True)
class PlacedText:
    """A text of a row that a model has to read."""

    place: str
    """File and line, for messages."""
    what: str
    """`the prompt` or `the response`."""
    text: str


def placed_texts(rows: Iterable[RowTexts]) -> list[PlacedText]:
    """What a model has to read of rows."""
    found = []
    for row in rows:
        if row.messages:
            found.append(PlacedText(row.place, "the prompt", row.messages[-1].content))
        found += [PlacedText(row.place, RESPONSE, text) for text in row.responses]
    return found


def require_tokens(texts: Sequence[PlacedText], tokenizer: PreTrainedTokenizerBase, model: str, chat: bool) -> None:
    """Refuse texts that the tokenizer of `model` makes no token of, and responses that are an end token alone: all of
    them in one DataError."""
    form = text_format(tokenizer, chat)
    bare = [form.without_end(one.text) if one.what == RESPONSE else one.text for one in texts]
    problems = [
        f"{texts[i].place}: {texts[i].what}, {shown(texts[i].text)}, "
        + (f"has no token: the tokenizer of {model} leaves all of it out" if bare[i] else "is an end token alone")
        for i in _without_tokens(bare, tokenizer)
    ]
    if problems:
        raise DataError(listed(problems, len({one.place for one in texts}), "take the rows out, or use another model"))


def require_prompts_fit(
    prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, model: str, chat: bool, limit: int
) -> None:
    """Refuse prompts that have more tokens than `limit`, or none, for the tokenizer of `model`, in one DataError."""
    lengths = {prompt.uid: len(render(tokenizer, prompt.messages, chat)) for prompt in prompts}
    if empty := [uid for uid, length in lengths.items() if not length]:
        raise DataError(f"held-out prompt {empty[0]}: the tokenizer of {model} makes no token of it; take it out")
    long = [uid for uid, length in lengths.items() if length > limit]
    if long:
        worst = max(long, key=lengths.__getitem__)
        have = "held-out prompts have" if len(long) > 1 else "held-out prompt has"
        raise DataError(
            f"{len(long)} {have} more tokens than rollout.max_prompt_tokens, {limit}, with the tokenizer of {model}; "
            f"the longest is {worst} with {lengths[worst]}: raise the key to that, or take long prompts out"
        )


def _without_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Which of the texts have no token."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    alphabet = sorted(characters)
    # Texts by the million would take minutes; their alphabet is a few thousand characters, mostly none of them unknown.
    unknown = {c for c, ids in zip(alphabet, _encoded(alphabet, tokenizer), strict=True) if not ids}
    candidates = [i for i, text in enumerate(texts) if unknown.issuperset(text)]
    encoded = _encoded([texts[i] for i in candidates], tokenizer)
    return [i for i, ids in zip(candidates, encoded, strict=True) if not ids]


def told_apart(
    judgements: Judgements, tokenizer: PreTrainedTokenizerBase, chat: bool, unusable: Unusable
) -> Judgements:
    """The judgements without those from whose tokens nothing can be learnt, which are added to `dropped`. An end token
    that a response brings is not counted: every response gets one.

    Raises DataError, listing them, where `unusable` is refuse, or where nothing is left.
    """
    if not isinstance(judgements, FileJudgements) or not judgements.items:
        return judgements
    sides = [j.responses if isinstance(j, Comparison) else (j.response,) for j in judgements.items]
    form = text_format(tokenizer, chat)
    encoded = _encoded([form.without_end(text) for texts in sides for text in texts], tokenizer)
    starts = [0, *accumulate(map(len, sides))]
    reasons = [
        _reason(judgement, encoded[start:end])
        for judgement, (start, end) in zip(judgements.items, pairwise(starts), strict=True)
    ]
    found = [reason for reason in reasons if reason]
    if not found:
        return judgements
    if unusable == "refuse":
        raise DataError(listed(found, len(judgements), WAY_OUT))
    kept = [judgement for judgement, reason in zip(judgements.items, reasons, strict=True) if not reason]
    if not kept:
        raise DataError(listed(found, len(judgements), "no row is left to learn from"))
    return FileJudgements(kept, (*judgements.dropped, *found))


def _reason(judgement: Judgement, encoded: Sequence[Sequence[int]]) -> str:
    texts = judgement.responses if isinstance(judgement, Comparison) else (judgement.response,)
    for text, ids in zip(texts, encoded, strict=True):
        if not ids:
            return f"{judgement.place}: the response {shown(text)} has no token: the tokenizer leaves all of it out"
    for (one, mine), (other, theirs) in combinations(zip(texts, encoded, strict=True), 2):
        if mine == theirs:
            return (
                f"{judgement.place}: the responses {shown(one)} and {shown(other)} differ as text, and are the same "
                "tokens to the model"
            )
    return ""


def _encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded: list[list[int]] = []
    for start in range(0, len(texts), CHUNK):
        chunk = list(texts[start : start + CHUNK])
        # verbose: a text longer than the model's positions is dropped and counted later; no warning of the library's.
        encoded += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
    return encoded
