"""Conversations to tokens: the one place that decides what the policy sees, for training and for generation alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import ModelError
from rlhf_dist.types import Message

if TYPE_CHECKING:  # transformers takes seconds to import, and the tokenizer is handed in
    from transformers import PreTrainedTokenizerBase


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], chat: bool) -> list[int]:
    """The prompt's token ids [P].

    chat: through the model's template, up to where the assistant begins. Otherwise the turns' texts as they are, one
    line after another, with the special tokens that the tokenizer puts before a text.
    Raises ModelError when there is no template or it refuses the turns.
    """
    if not chat or not messages:
        return list(tokenizer.encode("\n".join(m.content for m in messages), add_special_tokens=True))
    if not tokenizer.chat_template:
        raise ModelError("the model's tokenizer has no chat template; set data.chat=false or use a model that has one")
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        # return_dict: transformers 5 gives a BatchEncoding otherwise, whose iteration yields names, not tokens.
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    except TemplateError as error:
        roles = ", ".join(m.role for m in messages)
        raise ModelError(f"the model's chat template refuses a conversation of the roles {roles}: {error}") from error
    return cast(list[int], tokens)


def tokenize_demonstration(
    tokenizer: PreTrainedTokenizerBase, demo: Demonstration, chat: bool
) -> tuple[list[int], list[int]]:
    """(prompt tokens [P], response tokens [R]); the response closes with the end token.

    Plain text has no prompt beyond the tokenizer's own start token; where there is none, its first token is the prompt,
    since nothing comes before it to predict it from. Raises ModelError as `render` does,
    and when the tokenizer has no end token.
    """
    end = cast(int | None, tokenizer.eos_token_id)
    if end is None:
        raise ModelError("the model's tokenizer has no end token (eos_token), so a response could never end")
    response = list(tokenizer.encode(demo.response, add_special_tokens=False))
    prompt = render(tokenizer, demo.messages, chat)
    sequence = [*response, end]
    return (prompt, sequence) if prompt else (sequence[:1], sequence[1:])
