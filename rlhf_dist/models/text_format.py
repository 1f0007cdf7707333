"""How a tokenizer and its chat template turn text into tokens, found by a probe instead of taken on trust."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from rlhf_dist.errors import ModelError
from rlhf_dist.models.model_files import reason_of
from rlhf_dist.types import Message

if TYPE_CHECKING:  # transformers takes seconds to import, and the tokenizer is handed in
    from transformers import PreTrainedTokenizerBase


def probe_text(name: str) -> str:
    """A text with what a template may alter inside: two spaces, a line break, marks, an umlaut."""
    return f'{name}  <1> & "{name}"\nÄ {name}'


QUESTION, ANSWER, FOLLOW_UP, REPLY, RULE = map(probe_text, ("Kilo", "Lima", "Mike", "November", "Oscar"))
REASONING = re.compile(r"\s*[<\[][^<>\[\]]*(think|thought|reason)", re.IGNORECASE)
"""How a text begins that opens or skips a model's reasoning: `<think>`, `[THINK]`, `<|begin_of_thought|>`."""
OPENS = re.compile(r"\s*([<\[])([\w:]+)([>\]])\s*\Z")
"""How a prompt ends that opens a model's reasoning and does not close it."""
ABOUT_REASONING = re.compile("think|thought|reason", re.IGNORECASE)
"""Words of a template's text that begins or skips reasoning, however it marks it."""
WAY_OUT = "correct its chat_template.jinja, or set data.chat=false to use prompts as they are"
MORE: dict[str, list[dict[str, Any]]] = {
    "documents": [{"title": QUESTION, "text": ANSWER, "contents": ANSWER}],
    "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": {"properties": {}}}}],
}
"""What else a template may be given, and never is here."""
PROBES = 16
"""Tokenizers whose format is remembered; a process has a few."""


@dataclass(frozen=True, slots=True)
class TextFormat:
    """What the probe found."""

    chat: bool
    """Whether conversations go through the chat template."""
    start: tuple[int, ...]
    """Tokens that the tokenizer puts before a plain text."""
    end: int
    """Closes a response to a conversation: the template's own end of turn, else the tokenizer's end token."""
    text_end: int
    """The tokenizer's end token (eos): closes plain text, and a response where there is no template."""
    marks: tuple[str, ...] = ()
    """Special tokens that the template itself writes into a conversation, as text."""
    opening: str = ""
    """What the generation prompt ends with and an answer does not follow in the template, as in `<think>`."""
    before_answer: str = ""
    """What the template writes before an answer that is not in the generation prompt."""
    closing: str = ""
    """What closes a turn, where that is no token of the tokenizer; empty otherwise."""
    end_texts: tuple[str, ...] = field(default=())
    """`end` and `text_end` as text, where the tokenizer reads such a text as the token."""

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return tuple(dict.fromkeys((self.end, self.text_end)))

    def without_end(self, text: str) -> str:
        """`text` without the end tokens that it brings at its own end, and the white space after them."""
        while found := next((end for end in self.end_texts if text.rstrip().endswith(end)), None):
            text = text.rstrip().removesuffix(found)
        return text


def text_format(tokenizer: PreTrainedTokenizerBase, chat: bool) -> TextFormat:
    """Probe a tokenizer, and with `chat` its template: a conversation of two turns, with and without the last answer.

    Raises ModelError naming the tokenizer's directory: no end token, no template, a template that does not render,
    ignores the generation prompt, leaves out, alters or reorders turns, or writes something else before an answer.
    """
    return _probed(tokenizer, chat, repr(tokenizer.chat_template))


def check_format(tokenizer: PreTrainedTokenizerBase, chat: bool, system: str) -> None:
    """Refuse a tokenizer or a template that a run could not use; `system` is `data.system`. Raises ModelError."""
    text_format(tokenizer, chat)
    if chat and system:
        require_system(tokenizer)


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that can close a response, with the chat template and without; where it cannot be used, without."""
    found: set[int] = set()
    for chat in (False, True):
        with suppress(ModelError):
            found.update(text_format(tokenizer, chat).stops)
    return found


def require_system(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a template that does not show a system turn; `data.system` is set. Raises ModelError."""
    turns = (Message("system", RULE), Message("user", QUESTION))
    way = "empty data.system (put its text into the prompts), or use another template"
    try:
        text = chat_text(tokenizer, turns, prompt=True)
    except ModelError as error:
        raise ModelError(f"{error}. It gets a system turn because data.system is set; {way}") from error
    if RULE not in text:
        raise ModelError(f"{_name(tokenizer)}: its chat template leaves out the system turn of data.system; {way}")


def require_roles(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> None:
    """Refuse a template that does not show every turn of a prompt of these roles as it is. Raises ModelError."""
    turns = [Message(role, probe_text(f"Papa{number}x")) for number, role in enumerate(roles)]
    _require_turns(_name(tokenizer), chat_text(tokenizer, turns, prompt=True), turns)


def chat_text(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], prompt: bool) -> str:
    """A conversation as the template writes it; `prompt`: up to where the assistant begins. Raises ModelError."""
    return cast(str, _applied(tokenizer, turns, prompt, tokenize=False))


def chat_tokens(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message]) -> list[int]:
    """The tokens of a conversation up to where the assistant begins, with one start token. Raises ModelError."""
    tokens = list(cast(list[int], _applied(tokenizer, turns, prompt=True, tokenize=True)))
    start = tokenizer.bos_token_id
    return tokens[1:] if start is not None and tokens[:2] == [start, start] else tokens


def _applied(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], prompt: bool, tokenize: bool) -> Any:
    require_template(tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        # return_dict: transformers 5 gives a BatchEncoding otherwise, whose iteration yields names, not tokens.
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=tokenize, return_dict=False
        )
    except Exception as error:  # a template is a program: it can fail in any way
        roles = ", ".join(turn.role for turn in turns)
        asked = type(error) is TemplateError  # what a template raises of its own will
        reason = reason_of(error) if asked else f"{type(error).__name__}: {reason_of(error)}"
        lacks = [name for name, given in MORE.items() if _renders_with(tokenizer, messages, **{name: given})]
        more = (
            f" without {lacks[0]}, which prompts here never have (use the model's template for chat)" if lacks else ""
        )
        raise ModelError(
            f"{_name(tokenizer)}: its chat template {'rejects' if asked else 'fails on'} a conversation of the roles "
            f"{roles}{more}: {reason}"
        ) from error


def _renders_with(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **more: Any) -> bool:
    """Whether a template that failed works with these."""
    with suppress(Exception):  # as in `_applied`
        return bool(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **more))
    return False


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError when there is no template, or only named ones of which none is the default."""
    template: Any = tokenizer.chat_template
    if not template:
        raise ModelError(
            f"{_name(tokenizer)}: its tokenizer has no chat template; set data.chat=false to use prompts as they are, "
            "or add chat_template.jinja to the directory"
        )
    if isinstance(template, dict) and "default" not in template:
        raise ModelError(
            f"{_name(tokenizer)}: its tokenizer has the chat templates {', '.join(sorted(template))} and none named "
            "default; save the one to use as chat_template.jinja in the directory, or set data.chat=false"
        )


def hidden_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The special tokens, as text, that are left out of a response's text."""
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "the model"


@lru_cache(maxsize=PROBES)
def _probed(tokenizer: PreTrainedTokenizerBase, chat: bool, _template: str) -> TextFormat:
    """`_template` is there so that another template is another entry."""
    text_end = cast(int | None, tokenizer.eos_token_id)
    if text_end is None:
        raise ModelError(f"{_name(tokenizer)}: its tokenizer has no end token; set eos_token in tokenizer_config.json")
    start = _start(tokenizer)
    if not chat:
        return TextFormat(False, start, text_end, text_end, end_texts=_as_text(tokenizer, (text_end,)))
    for turns in ((QUESTION,), (QUESTION, ANSWER, FOLLOW_UP)):
        found = _check_template(tokenizer, turns)
    end, closing = _turn_end(tokenizer, text_end)
    return TextFormat(
        chat=True,
        start=start,
        end=end,
        text_end=text_end,
        marks=found.marks,
        opening=found.opening,
        before_answer=found.before_answer,
        closing=closing,
        end_texts=_as_text(tokenizer, dict.fromkeys((end, text_end))),
    )


def _start(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text. What it puts after one is never used: a prompt goes on."""
    plain: list[int] = []
    for text in ("a", "A", "1", ".", "\n"):  # a small vocabulary may lack some of them
        plain = list(tokenizer.encode(text, add_special_tokens=False))
        whole = list(tokenizer.encode(text, add_special_tokens=True))
        if plain:
            break
    else:
        return ()
    for at in range(len(whole) - len(plain) + 1):
        if whole[at : at + len(plain)] == plain:
            return tuple(whole[:at])
    raise ModelError(
        f"{_name(tokenizer)}: its tokenizer reads {text!r} as the tokens {plain}, and as {whole} with its special "
        "tokens: it does more than to put tokens before and after a text; correct post_processor in tokenizer.json"
    )


def _as_text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int] | dict[int, None]) -> tuple[str, ...]:
    texts = {token: cast(str, tokenizer.decode([token], skip_special_tokens=False)) for token in tokens}
    return tuple(
        text
        for token, text in texts.items()
        if text.strip() and list(tokenizer.encode(text, add_special_tokens=False)) == [token]
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What one conversation showed."""

    marks: tuple[str, ...]
    opening: str
    before_answer: str


def _conversation(*texts: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))


def _check_template(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> _Found:
    """Compare a prompt with the same conversation and its answer. Raises ModelError."""
    require_template(tokenizer)
    name, turns = _name(tokenizer), _conversation(*texts)
    try:
        prompt = chat_text(tokenizer, turns, prompt=True)
        without = chat_text(tokenizer, turns, prompt=False)
        whole = chat_text(tokenizer, (*turns, Message("assistant", REPLY)), prompt=False)
    except ModelError as error:
        raise ModelError(f"{error}. {WAY_OUT[0].upper()}{WAY_OUT[1:]}") from error
    _require_turns(name, prompt, turns)
    _require_turns(name, whole, (*turns, Message("assistant", REPLY)))
    at = whole.rindex(REPLY)
    shared = _shared(prompt, whole[:at])
    opens = OPENS.search(prompt, 0, shared)
    if opens and not prompt[shared:].strip() and whole[shared:at].lstrip().startswith(closing_mark(opens)):
        shared = opens.start(1)  # the template itself closes at once, before an answer, what the prompt opens
    opening, before = prompt[shared:], whole[shared:at]
    if opening.strip() and not ABOUT_REASONING.search(opening):
        raise ModelError(
            f"{name}: its chat template ends a prompt with {opening!r} and writes {before!r} in its place before an "
            f"answer, so that a response would not follow the prompt; {WAY_OUT}"
        )
    if prompt == without and before.strip() and not ABOUT_REASONING.search(before):
        raise ModelError(
            f"{name}: its chat template ignores add_generation_prompt: a prompt ends with the user's turn, and "
            f"{before!r}, which opens the assistant's turn, is missing; add "
            "'{% if add_generation_prompt %}...{% endif %}' with that text to its chat_template.jinja, or set "
            "data.chat=false"
        )
    marks = tuple(token for token in hidden_tokens(tokenizer) if token in whole)
    return _Found(marks, opening, before if before.strip() else "")


def closing_mark(opens: re.Match[str]) -> str:
    """`</think>` for a match of OPENS at `<think>`."""
    return f"{opens[1]}/{opens[2]}{opens[3]}"


def _require_turns(name: str, text: str, turns: Sequence[Message]) -> None:
    """Every turn as it is and in order, or ModelError."""
    at = 0
    for number, turn in enumerate(turns, 1):
        found, count = text.find(turn.content, at), text.count(turn.content)
        if found < 0 or count > 1:
            fault = "repeats" if count > 1 else "changes the order of the turns with" if count else "leaves out"
            if not count and turn.content.partition(" ")[0].casefold() in text.casefold():
                fault = "alters the text of"
            raise ModelError(
                f"{name}: its chat template {fault} turn {number}, the {turn.role}'s, of a conversation of the roles "
                f"{', '.join(t.role for t in turns)}; {WAY_OUT}"
            )
        at = found + len(turn.content)


def _turn_end(tokenizer: PreTrainedTokenizerBase, text_end: int) -> tuple[int, str]:
    """(token that closes an assistant's turn, the closing text where that is no token)."""
    whole = chat_text(tokenizer, _conversation(QUESTION, ANSWER, FOLLOW_UP, REPLY), prompt=False)
    asked, answered, followed = (
        _tokens(tokenizer, whole.partition(one)[2].partition(other)[0])
        for one, other in ((QUESTION, ANSWER), (ANSWER, FOLLOW_UP), (FOLLOW_UP, REPLY))
    )
    after = whole.rpartition(REPLY)[2]
    last = _tokens(tokenizer, after)
    known = _added(tokenizer)
    # A turn ends the same way in the middle of a conversation; what comes after that end opens the next turn.
    closed = last[: _shared(last, answered)] if last else answered[: _shared(answered, asked)]
    found = next((token for token in closed if token in known), None)
    if found is None and text_end not in last:
        found = next((token for token in last if token in known and token not in followed), None)
    if found is not None:
        return found, ""
    return text_end, cast(str, tokenizer.decode(closed)).strip() if last and text_end not in last else ""


def _added(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that stand for themselves: special ones and others that were added to the vocabulary."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False)) if text else []


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the longest common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(one), len(other)))
