"""What the probe finds of templates and tokenizers, and what it rejects."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_tokenizers import small_tokenizer

from rlhf_dist.data.render import render, tokenize_demonstration, tokenize_response
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import ModelError
from rlhf_dist.models.inspect import inspect
from rlhf_dist.models.text_format import require_system, text_format
from rlhf_dist.types import Message

USER = (Message("user", "ab"),)


def turns(after: str, header: str = "<|' + m['role'] + '|>", opening: str = "<|assistant|>", start: str = "") -> str:
    """A template: header, text, `after`; `opening` is the generation prompt."""
    return (
        f"{start}{{% for m in messages %}}{{{{ '{header}' + m['content'] + '{after}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '{opening}' }}}}{{% endif %}}"
    )


LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if loop.last and m.role == 'assistant' %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|eot|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CLOSES_LAST = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if not loop.last %}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|eot|><|assistant|>' }}{% endif %}"
)
ALWAYS_OPENS = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}{{ '<|assistant|>' }}"
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|system|>Be good.<|eot|>\n' }}{% endif %}" + turns(
    "<|eot|>\\n", opening="<|assistant|>"
)

DEMONSTRATIONS = {
    # template -> the demonstration (ab, xy), prompt and response; the start token comes from the template only
    "the tokenizer's end token": (turns("</s>"), "<|user|>ab</s><|assistant|>", "xy</s>"),
    "an end of turn of its own": (turns("<|eot|>"), "<|user|>ab<|eot|><|assistant|>", "xy<|eot|>"),
    "a line break behind the end": (turns("<|eot|>\\n"), "<|user|>ab<|eot|>\n<|assistant|>", "xy<|eot|>"),
    "an end of turn, then the end of the text": (
        turns("<|eot|>").replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add"),
        "<|user|>ab<|eot|><|assistant|>",
        "xy<|eot|>",
    ),
    "a start token": (turns("<|eot|>", start="{{ bos_token }}"), "<s><|user|>ab<|eot|><|assistant|>", "xy<|eot|>"),
    "a start token twice": (
        turns("</s>", start="{{ bos_token }}{{ bos_token }}"),
        "<s><|user|>ab</s><|assistant|>",
        "xy</s>",
    ),
    "nothing that closes a turn": (turns(""), "<|user|>ab<|assistant|>", "xy</s>"),
    "an end that the last turn lacks": (CLOSES_LAST, "<|user|>ab<|eot|><|assistant|>", "xy<|eot|>"),
    "no header for the assistant": (LLAMA2, "<s>[INST] ab [/INST]", "xy</s>"),
    "turns that only the end token parts": (turns("</s>", header="", opening=""), "ab</s>", "xy</s>"),
    "the assistant's header always": (ALWAYS_OPENS, "<|user|>ab</s><|assistant|>", "xy</s>"),
    "a system turn of its own": (
        DEFAULT_SYSTEM,
        "<|system|>Be good.<|eot|>\n<|user|>ab<|eot|>\n<|assistant|>",
        "xy<|eot|>",
    ),
    "empty thoughts before the last answer": (THINKS, "<|user|>ab<|eot|>\n<|assistant|>", "xy<|eot|>"),
    "a prompt that begins to think": (
        turns("<|eot|>", opening="<|assistant|><think>\\n"),
        "<|user|>ab<|eot|><|assistant|><think>\n",
        "xy<|eot|>",
    ),
    "a prompt that skips a channel of thoughts": (
        turns("<|eot|>", opening="<|assistant|><|channel>thought\\n<channel|>"),
        "<|user|>ab<|eot|><|assistant|><|channel>thought\n<channel|>",
        "xy<|eot|>",
    ),
    "a prompt that announces the reasoning in words": (
        turns("<|eot|>", opening="<|assistant|>Here are my reasoning steps:\\n"),
        "<|user|>ab<|eot|><|assistant|>Here are my reasoning steps:\n",
        "xy<|eot|>",
    ),
    "an end of turn that is not special": (turns("<end>"), "<|user|>ab<end><|assistant|>", "xy<end>"),
    "an end of turn in letters": (turns("<|im_end|>"), "<|user|>ab<|im_end|><|assistant|>", "xy</s>"),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_a_demonstration_closes_as_the_template_closes_a_turn(name: str) -> None:
    template, prompt, response = DEMONSTRATIONS[name]
    tokenizer = small_tokenizer(template, plain=["<end>"])
    found = tokenize_demonstration(tokenizer, Demonstration(USER, "xy"), chat=True)
    assert tuple(tokenizer.decode(part) for part in found) == (prompt, response)
    form = text_format(tokenizer, chat=True)
    assert found[1][-1] == form.end and form.stops == tuple(dict.fromkeys((form.end, tokenizer.eos_token_id)))


def test_what_stands_around_an_answer_is_known() -> None:
    form = text_format(small_tokenizer(THINKS), chat=True)
    assert (form.opening, form.before_answer, form.closing) == ("", "<think>\n\n</think>\n\n", "")
    assert form.marks == ("<|user|>", "<|assistant|>", "<|eot|>", "<think>", "</think>")
    form = text_format(small_tokenizer(turns("<|im_end|>", opening="<|assistant|><think>\\n")), chat=True)
    assert (form.opening, form.before_answer, form.closing) == ("<think>\n", "", "<|im_end|>")
    for opening in ("<think>\\n", "<think>", "<think>\\n\\n"):  # an answer without reasoning is shown with empty one
        both = THINKS.replace("'<|assistant|>' }}", f"'<|assistant|>{opening}' }}}}")
        form = text_format(small_tokenizer(both), chat=True)
        assert (form.opening, form.before_answer) == (opening.replace("\\n", "\n"), "<think>\n\n</think>\n\n")


GENERATION = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
REJECTED = {
    "syntax": ("{% for m in messages %}{{ m.content }", "fails on .* user: TemplateSyntaxError"),
    "TypeError": ("{{ messages[0].content + 1 }}", "fails on .* user: TypeError"),
    "ZeroDivisionError": (
        "{{ 1 / 0 }}",
        "ZeroDivisionError: division by zero. Correct its chat_template.jinja, or set",
    ),
    "undefined": ("{{ messages[0].text.strip() }}", "UndefinedError"),
    "documents": (
        "{% for d in documents %}{{ d.title }}{% endfor %}" + turns("</s>"),
        r"roles user without documents, which prompts here never have \(use the model's template for chat\): TypeError",
    ),
    "tools": (
        "{{ tools[0].function.name }}" + turns("</s>"),
        "roles user without tools, which prompts here never have",
    ),
    "its own long words": ("{{ raise_exception('x' * 400) }}", f"{'x' * 400}. Correct its chat_template.jinja"),
    "OverflowError": ("{% for i in range(10000000) %}{% endfor %}", "OverflowError"),
    "RecursionError": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "one turn only": (
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}" + turns("</s>"),
        "rejects a conversation of the roles user, assistant: one turn only",
    ),
    "no default": ({"chat": turns("</s>"), "tool_use": turns("</s>")}, "chat templates chat, tool_use and none named"),
    "empty": ("{{ '' }}", "leaves out turn 1, the user's"),
    "the last turn only": ("<|user|>{{ messages[-1].content }}</s>" + GENERATION, "leaves out turn 1, the user's"),
    "the first turn only": ("<|user|>{{ messages[0].content }}</s>" + GENERATION, "leaves out turn 2, the assistant's"),
    "no answers": (
        "{% for m in messages if m.role == 'user' %}<|user|>{{ m.content }}</s>{% endfor %}" + GENERATION,
        "leaves out turn 2, the assistant's",
    ),
    "the wrong order": (
        "{% for m in messages | reverse %}{{ '<|' + m.role + '|>' + m.content + '</s>' }}{% endfor %}" + GENERATION,
        "changes the order of the turns with turn 2",
    ),
    "twice": ("{% for i in (0, 1) %}" + turns("</s>") + "{% endfor %}", "repeats turn 1"),
    "upper case": (turns("</s>").replace("m['content']", "m['content'] | upper"), "alters the text of turn 1"),
    "escaped": (turns("</s>").replace("m['content']", "m['content'] | escape"), "alters the text of turn 1"),
    "one line": (
        turns("</s>").replace("m['content']", "m['content'].split() | join(' ')"),
        "alters the text of turn 1",
    ),
    "truncated": (turns("</s>").replace("m['content']", "m['content'][:9]"), "alters the text of turn 1"),
    "no generation prompt": (
        turns("</s>", opening=""),
        r"ignores add_generation_prompt: .* and '<\|assistant\|>', which opens the assistant's turn, is missing",
    ),
    "another generation prompt": (
        turns("</s>", opening="<|assistant|>Answer: "),
        r"ends a prompt with 'Answer: ' and writes '' in its place before an answer",
    ),
    "another header": (turns("</s>", opening="<|bot|>"), r"ends a prompt with 'bot\|>' and writes 'assistant\|>' in"),
    "the end after the prompt": (turns("</s>", opening="<|assistant|></s>"), "ends a prompt with '</s>' and writes ''"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_a_template_that_cannot_be_used_is_rejected(name: str) -> None:
    template, message = REJECTED[name]
    with pytest.raises(ModelError, match=message) as raised:
        text_format(small_tokenizer(template), chat=True)
    assert "data.chat=false" in str(raised.value) and len(str(raised.value)) < 700


def test_the_model_is_rejected_when_it_is_inspected(tiny_model: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = model / "chat_template.jinja"
    inspect(model, True, "cpu", 16, system="Be kind.")
    template.write_text("{{ 1 / 0 }}")
    with pytest.raises(ModelError, match=f"^{model}: its chat template fails on .*ZeroDivisionError"):
        inspect(model, True, "cpu", 16)
    inspect(model, False, "cpu", 16)
    template.write_text("{{ raise_exception('no system') if messages[0].role == 'system' }}" + turns("<|end|>"))
    inspect(model, True, "cpu", 16)
    with pytest.raises(ModelError, match=r"roles system, user: no system\. .* because data\.system is set"):
        inspect(model, True, "cpu", 16, system="Be kind.")


def test_a_system_turn_that_is_left_out_is_told() -> None:
    template = turns("</s>").replace("in messages", "in messages if m.role != 'system'")
    text_format(small_tokenizer(template), chat=True)
    with pytest.raises(ModelError, match=r"leaves out the system turn of data\.system; empty data\.system"):
        require_system(small_tokenizer(template))


RAW = {
    # what the tokenizer makes of a text $A, the text -> the prompt
    "nothing": ("$A", "ab", "ab"),
    "a start token": ("<s> $A", "ab", "<s>ab"),
    "an end token": ("<s> $A </s>", "ab", "<s>ab"),
    "an end token alone": ("$A </s>", "ab", "ab"),
    "two frames": ("[CLS] $A [SEP]", "ab", "[CLS]ab"),
    "a start token that is the end token": ("</s> $A", "ab", "</s>ab"),
    "a text with its start token": ("<s> $A", "<s>ab", "<s>ab"),
    "a text with its start token, closed": ("<s> $A </s>", "<s><|user|>ab<|assistant|>", "<s><|user|>ab<|assistant|>"),
    "a text with a start token of its own": ("$A", "<s>ab", "<s>ab"),
}


@pytest.mark.parametrize("name", RAW)
def test_a_plain_prompt_has_one_start_token_and_no_end(name: str) -> None:
    single, text, expected = RAW[name]
    tokenizer = small_tokenizer(None, single)
    assert tokenizer.decode(render(tokenizer, (Message("user", text),), chat=False)) == expected


@pytest.mark.parametrize(
    ("single", "text", "expected"),
    [
        ("<s> $A </s>", "xy", ("<s>", "xy</s>")),
        ("<s> $A", "<s>xy</s>", ("<s>", "xy</s>")),
        ("$A </s>", "xy", ("x", "y</s>")),
        ("$A", "xy</s></s>\n", ("x", "y</s>")),
    ],
)
def test_plain_text_to_learn_has_one_start_and_one_end(single: str, text: str, expected: tuple[str, str]) -> None:
    tokenizer = small_tokenizer(turns("<|eot|>"), single)
    found = tokenize_demonstration(tokenizer, Demonstration((), text), chat=True)
    assert tuple(tokenizer.decode(part) for part in found) == expected


@pytest.mark.parametrize("response", ["xy", "xy<|eot|>", "xy<|eot|>\n", "xy</s>", "xy<|eot|></s>"])
def test_a_response_that_brings_its_end_gets_no_second_one(response: str) -> None:
    tokenizer = small_tokenizer(turns("<|eot|>"))
    assert tokenizer.decode(tokenize_response(tokenizer, response, chat=True)) == "xy<|eot|>"
    assert tokenizer.decode(tokenize_response(tokenizer, response, chat=True, ended=False)) == "xy"
    closed = tokenizer.decode(tokenize_response(tokenizer, response.replace("<|eot|>", "</s>"), chat=False))
    assert closed == "xy</s>"


def test_what_is_no_end_stays_in_a_response() -> None:
    tokenizer = small_tokenizer(turns("</s>"))
    for response in ("x</s>y", "xy \n", "xy<|eot|>", "</sxy"):
        assert tokenizer.decode(tokenize_response(tokenizer, response, chat=True)) == f"{response}</s>"


def test_a_tokenizer_that_does_more_to_a_text_than_frame_it_is_rejected() -> None:
    class Odd:
        eos_token_id, chat_template, name_or_path = 1, None, "odd"

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [5, 9] if add_special_tokens else [7]

    with pytest.raises(ModelError, match=r"odd: its tokenizer reads 'a' as the tokens \[7\], and as \[5, 9\] with"):
        text_format(Odd(), chat=False)  # pyright: ignore[reportArgumentType]
