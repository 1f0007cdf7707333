import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_dist.data.render import render, tokenize_demonstration
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.errors import ModelError
from rlhf_dist.types import Message

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    "<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
USER = (Message("user", "ab"),)


def make(start: bool = False, **options) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<u>", "<a>", *"\nabcdefghijklmnopqrstuvwxyz"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if start:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, additional_special_tokens=["<u>", "<a>"], **{"eos_token": "</s>", **options}
    )


def spell(tokenizer, tokens) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(tokens))


def test_chat_goes_through_the_template_and_opens_the_assistants_turn():
    tokenizer = make(chat_template=TEMPLATE)
    tokens = render(tokenizer, USER, chat=True)
    assert type(tokens) is list and all(type(t) is int for t in tokens)
    assert spell(tokenizer, tokens) == "<u>ab<a>"
    more = (*USER, Message("assistant", "c"), Message("user", "d"))
    assert spell(tokenizer, render(tokenizer, more, chat=True)) == "<u>ab<a>c<u>d<a>"


def test_raw_text_is_left_as_it_is():
    tokenizer = make(start=True)
    assert spell(tokenizer, render(tokenizer, USER, chat=False)) == "<s>ab"
    two = (Message("system", "x"), *USER)
    assert spell(tokenizer, render(tokenizer, two, chat=False)) == "<s>x\nab"


def test_demonstrations_close_with_the_end_token():
    tokenizer = make(start=True, chat_template=TEMPLATE)
    prompt, response = tokenize_demonstration(tokenizer, Demonstration(USER, "ba"), chat=True)
    assert (spell(tokenizer, prompt), spell(tokenizer, response)) == ("<u>ab<a>", "ba</s>")
    assert prompt == render(tokenizer, USER, chat=True)


def test_plain_text_is_predicted_from_the_start_token_or_else_from_its_own_first_token():
    for tokenizer, expected in (
        (make(start=True, chat_template=TEMPLATE), ("<s>", "abc</s>")),
        (make(), ("a", "bc</s>")),
    ):
        prompt, response = tokenize_demonstration(tokenizer, Demonstration((), "abc"), chat=True)
        assert (spell(tokenizer, prompt), spell(tokenizer, response)) == expected


def test_an_empty_text_without_a_start_token_leaves_nothing_to_learn():
    assert tokenize_demonstration(make(), Demonstration((), ""), chat=True) == ([1], [])


def test_models_that_cannot_do_it_say_so():
    with pytest.raises(ModelError, match=r"no chat template; set data\.chat=false"):
        render(make(), USER, chat=True)
    with pytest.raises(ModelError, match="rejects a conversation of the roles system, user: no system turns here"):
        render(make(chat_template=TEMPLATE), (Message("system", "x"), *USER), chat=True)
    with pytest.raises(ModelError, match="no end token"):
        tokenize_demonstration(make(eos_token=None), Demonstration(USER, "ba"), chat=False)
