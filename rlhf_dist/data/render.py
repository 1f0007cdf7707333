"""Conversations to tokens: the one place that decides what the policy sees, for training and for generation alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import ModelError
from rlhf_dist.models.text_format import chat_tokens, text_format
from rlhf_dist.types import Message

if TYPE_CHECKING:  # transformers takes seconds to import, and the tokenizer is handed in
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat: bool) -> list[int]:
    """The prompt's token ids [P].

    chat: through the model's template, up to where the assistant begins. Otherwise the turns' texts as they are, one
    line after another, behind the start token that the tokenizer puts before a text; a text that brings that token
    gets no second one, and what the tokenizer puts after a text is left away.
    Raises ModelError when there is no template or it rejects the turns.
    """
    if chat and messages:
        return chat_tokens(tokenizer, messages)
    start = list(text_format(tokenizer, chat=False).start)
    tokens = list(tokenizer.encode("\n".join(m.content for m in messages), add_special_tokens=False))
    return tokens if tokens[: len(start)] == start else start + tokens


def between(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], last: int) -> list[int]:
    """The tokens between a response and the next, through the model's template.

    messages: the conversation, of which the last two turns are the response and what the user says to it. `last`: the
    response's last token; where that is not the one that closes a turn (the response was truncated, or ended by a stop
    text), the turn is closed here. Raises ModelError where the template does not close a turn with that
    token, or writes the conversation before it in another way than `render` does.
    """
    form = text_format(tokenizer, chat=True)
    before, whole = chat_tokens(tokenizer, messages[:-2]), chat_tokens(tokenizer, messages)
    if whole[: len(before)] != before or form.end not in whole[len(before) :]:
        raise ModelError(
            f"{tokenizer.name_or_path}: its chat template changes what came before when a turn follows, or does not "
            "close turns by a token; a conversation of several turns cannot go on from the tokens that were sampled"
        )
    closed = whole.index(form.end, len(before))
    return whole[closed + 1 :] if last == form.end else whole[closed:]


def tokenize_response(tokenizer: PreTrainedTokenizerBase, response: str, chat: bool, ended: bool = True) -> list[int]:
    """The tokens of a response to a conversation, closed with the one token that ends it.

    A response that brings its own end token gets no second one. `ended`: false for one that was truncated.
    """
    form = text_format(tokenizer, chat)
    tokens = list(tokenizer.encode(form.without_end(response), add_special_tokens=False))
    return [*tokens, form.end] if ended else tokens


def tokenize_demonstration(
    tokenizer: PreTrainedTokenizerBase, demo: Demonstration, chat: bool
) -> tuple[list[int], list[int]]:
    """(prompt tokens [P], response tokens [R]); the response closes with the end token.

    Plain text has no prompt beyond the tokenizer's own start token; where there is none, its first token is the prompt,
    since nothing comes before it to predict it from. Raises ModelError as `text_format` and `render` do.
    """
    prompt = render(tokenizer, demo.messages, chat)
    sequence = tokenize_response(tokenizer, demo.response, chat and bool(demo.messages))
    if not demo.messages and sequence[: len(prompt)] == prompt:  # the text brings its own start token
        sequence = sequence[len(prompt) :]
    return (prompt, sequence) if prompt else (sequence[:1], sequence[1:])
