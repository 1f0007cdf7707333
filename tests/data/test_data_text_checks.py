"""What a look at the texts of files finds: end tokens, reasoning marks and headers that are added to them as well."""

from __future__ import annotations

import re

import pytest
from small_tokenizers import small_tokenizer

from rlhf_dist.data.text_checks import RowTexts, require_rendered, text_warnings
from rlhf_dist.errors import DataError
from rlhf_dist.types import Message


def template(opening: str = "", before: str = "", end: str = "<|eot|>") -> str:
    """Turns with a header and `end`; `opening` ends a prompt, `before` comes before the last answer."""
    return (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
        f"{{% if loop.last and m.role == 'assistant' %}}{{{{ '{before}' }}}}{{% endif %}}{{{{ m.content + '{end}' }}}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '<|assistant|>{opening}' }}}}{{% endif %}}"
    )


def rows(*responses: str, prompt: str = "ab") -> list[RowTexts]:
    asked = (Message("user", prompt),) if prompt else ()
    return [RowTexts(f"a.jsonl:{number}", asked, (text,)) for number, text in enumerate(responses, 1)]


THINKS = template(opening="<think>\\n")
SKIPS = template(before="<think>\\n\\n</think>\\n\\n")
FOUND = {
    "fine": (template(), rows("xy", "x y\n"), True, []),
    "an end at the end": (template(), rows("xy<|eot|>", "xy</s>", "xy<|eot|>\n"), True, []),
    "an end inside": (
        template(),
        rows("xy", "x</s>y", "x<|eot|>y"),
        True,
        [r"^2 of 3 responses hold an end token \(<\|eot\|>, </s>\) before their end.* at a\.jsonl:2: 'x</s>y'$"],
    ),
    "headers": (template(), rows("<|assistant|>xy"), True, [r"^1 of 1 responses hold special tokens that the .*user"]),
    "think twice": (
        THINKS,
        rows("<think>\na</think>b", "c</think>d"),
        True,
        ["^1 of 2 responses begin with '<think>', which the chat template writes at the end of a prompt.*twice"],
    ),
    "think twice, where an answer alone has empty thoughts": (
        template(opening="<think>\\n", before="<think>\\n\\n</think>\\n\\n"),
        rows("<think>\na</think>b", "c</think>d", "e"),
        True,
        ["^1 of 3 responses begin with '<think>'", "^1 of 3 responses have no </think>, .*:3"],
    ),
    "no thoughts": (THINKS, rows("a</think>b", "b"), True, ["^1 of 2 responses have no </think>, .*'<think>': .*:2"]),
    "no empty thoughts": (
        SKIPS,
        rows("<think>a</think>b", "b"),
        True,
        [r"^1 of 2 responses do not begin with '<think>\\n\\n</think>', which .* before an answer.*a\.jsonl:2"],
    ),
    "an end that is no token": (template(end="<|im_end|>"), rows("x", "y"), True, [r"^2 of 2 .* with '<\|im_end\|>'"]),
    "a rendered prompt": (template(), rows("xy", prompt="<|user|>ab"), True, ["^1 of 1 prompts .*data.chat=false"]),
    "a rendered prompt as it is": (template(), rows("xy", prompt="<|user|>ab<|eot|><|assistant|>"), False, []),
    "a prompt that ends": (template(), rows("xy", prompt="ab</s>"), False, [r"^1 of 1 prompts end with the end token"]),
    "plain text": (template(), rows("<s>x<|user|>y</s>", prompt=""), True, []),
    "two texts in one": (
        template(),
        rows("x</s>y", prompt=""),
        True,
        [r"^1 of 1 responses hold an end token \(</s>\)"],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_texts_that_bring_what_is_added_are_counted(name: str) -> None:
    form, texts, chat, words = FOUND[name]
    found = text_warnings(texts, small_tokenizer(form), chat)
    assert len(found) == len(words), found
    assert all(re.search(pattern, text) for pattern, text in zip(words, found, strict=True)), found


SYSTEM, USER, SAID = Message("system", "s"), Message("user", "ab"), Message("assistant", "c")
RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + template()
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('take turns') }}"
    "{% endif %}{% endfor %}" + template()
)
LEAVES_OUT = template().replace("in messages", "in messages if m.role != 'system'")


@pytest.mark.parametrize(
    ("form", "messages", "words"),
    [
        (RAISES, (SYSTEM, USER), r"^a\.jsonl:2: .*rejects a conversation of the roles system, user: no system; change"),
        (ALTERNATES, (USER, USER), r"^a\.jsonl:2: .*roles user, user: take turns"),
        (LEAVES_OUT, (SYSTEM, USER), r"^a\.jsonl:2: .*leaves out turn 1, the system's, of a conversation"),
    ],
)
def test_a_row_that_the_template_rejects_is_named(form: str, messages: tuple[Message, ...], words: str) -> None:
    tokenizer = small_tokenizer(form)
    good = RowTexts("a.jsonl:1", (USER, SAID, USER))
    require_rendered([good, good, RowTexts("a.jsonl:9", ())], tokenizer)
    with pytest.raises(DataError, match=words):
        require_rendered([good, RowTexts("a.jsonl:2", messages), RowTexts("a.jsonl:3", messages)], tokenizer)


def test_reasoning_that_a_template_leaves_out_of_earlier_turns_is_fine() -> None:
    tokenizer = small_tokenizer(template().replace("m.content +", "m.content.split('</think>')[-1] +"))
    require_rendered([RowTexts("a.jsonl:1", (USER, Message("assistant", "<think>a</think>b"), USER))], tokenizer)
