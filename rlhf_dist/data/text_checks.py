"""Texts of files against what the chat template and the tokenizer add to them, before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_dist.data.judgement_rows import Comparison, Judgement
from rlhf_dist.data.records import shown
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import DataError, ModelError
from rlhf_dist.models.text_format import (
    OPENS,
    REASONING,
    TextFormat,
    chat_text,
    closing_mark,
    require_roles,
    text_format,
)
from rlhf_dist.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RowTexts:
    """The texts of a row."""

    place: str
    """File and line, for messages."""
    messages: tuple[Message, ...]
    """The prompt; empty for plain text."""
    responses: tuple[str, ...] = ()
    """What follows it: a demonstration's, or those that are compared; none of a question."""
    answer: str = ""
    """What a rule compares with; empty where there is none."""


def texts_of_demonstrations(demos: Iterable[Demonstration]) -> list[RowTexts]:
    """Demonstrations of files as texts."""
    return [RowTexts(demo.place, demo.messages, (demo.response,)) for demo in demos]


def texts_of_judgements(judgements: Iterable[Judgement]) -> list[RowTexts]:
    """Judgements of files as texts."""
    return [
        RowTexts(one.place, one.messages, one.responses if isinstance(one, Comparison) else (one.response,))
        for one in judgements
    ]


def require_rendered(rows: Iterable[RowTexts], tokenizer: PreTrainedTokenizerBase) -> None:
    """Render the first conversation of every order of roles. Raises DataError for one that the template rejects or
    alters."""
    seen: set[tuple[str, ...]] = set()
    for row in rows:
        roles = tuple(turn.role for turn in row.messages)
        if not roles or roles in seen:
            continue
        seen.add(roles)
        try:
            require_roles(tokenizer, roles)
            chat_text(tokenizer, row.messages, prompt=True)
        except ModelError as error:
            raise DataError(f"{row.place}: {error}; change the row, or use a model with another template") from error


def text_warnings(rows: Sequence[RowTexts], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[str]:
    """A sentence for each way in which texts bring what is added to them, with how many do and where the first is."""
    found: list[str] = []
    for talk in (True, False):
        chosen = [row for row in rows if bool(row.messages) == talk]
        if chosen:
            form = text_format(tokenizer, chat and talk)
            prompts = [(row.place, "\n".join(turn.content for turn in row.messages)) for row in chosen]
            responses = [(row.place, text) for row in chosen for text in row.responses]
            found += [_counted(prompts, "prompts", *check) for check in _prompt_checks(form)]
            found += [_counted(responses, "responses", *check) for check in _response_checks(form)]
    return [text for text in found if text]


Check = tuple[Callable[[str], bool], str]
"""(whether a text has it, what it has and what follows from that)."""


def _prompt_checks(form: TextFormat) -> Iterator[Check]:
    if form.chat:
        marks = _marks(form)
        yield (
            lambda text: any(mark in text for mark in marks),
            f"hold special tokens that the chat template writes itself ({_some(marks)}), as if they had been rendered "
            "beforehand: set data.chat=false for such prompts, or take the tokens out",
        )
    else:
        yield (
            lambda text: form.without_end(text) != text,
            f"end with the end token ({_some(form.end_texts)}), and the response would come after it: take it out",
        )


def _response_checks(form: TextFormat) -> Iterator[Check]:
    yield (
        lambda text: any(end in form.without_end(text) for end in form.end_texts),
        f"hold an end token ({_some(form.end_texts)}) before their end, and the model would learn to go on after it: "
        "take it out",
    )
    opening, before = form.opening.strip(), form.before_answer.strip()
    marks = _marks(form)
    if marks:
        yield (
            lambda text: any(mark in text for mark in marks),
            f"hold special tokens that the chat template writes itself ({_some(marks)}), as if they had been rendered "
            "beforehand: take them out",
        )
    if opening:
        yield (
            lambda text: text.lstrip().startswith(opening),
            f"begin with {opening!r}, which the chat template writes at the end of a prompt, so that it would be there "
            "twice: take it out of the responses",
        )
    if found := OPENS.search(form.opening):
        close = closing_mark(found)
        yield (
            lambda text: close not in text,
            f"have no {close}, and the chat template ends a prompt with {opening!r}: the model would learn to answer "
            "inside its reasoning; add the reasoning and the mark, or use a template that does not open it",
        )
    if before and not opening:
        yield (
            lambda text: not REASONING.match(text) if REASONING.match(before) else not text.startswith(before),
            f"do not begin with {before!r}, which the chat template writes before an answer and not into a prompt: put "
            "it before them if the model is to write it",
        )
    if form.closing:
        yield (
            lambda text: True,
            f"close with the tokenizer's end token, and the chat template closes a turn with {form.closing!r}, which "
            "is not a token of the tokenizer: add it as one, or use the tokenizer that belongs to the template",
        )


def _marks(form: TextFormat) -> tuple[str, ...]:
    """Special tokens of the template that neither end a turn nor are about reasoning."""
    return tuple(mark for mark in form.marks if mark not in form.end_texts and "think" not in mark.casefold())


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:4]) + (", ..." if len(texts) > 4 else "")


def _counted(texts: Sequence[tuple[str, str]], name: str, has: Callable[[str], bool], what: str) -> str:
    places = [(place, text) for place, text in texts if has(text)]
    if not places:
        return ""
    place, text = places[0]
    return f"{len(places)} of {len(texts)} {name} {what}. The first is at {place}: {shown(text)}"
