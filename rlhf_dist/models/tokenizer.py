"""The tiny model's tokenizer: one token per character, built from code, so that nothing is downloaded."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""What the tokenizer can say: newline and printable ASCII."""

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def character_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of printable ASCII and newline: `decode(encode(text)) == text` for such text.

    A turn is `<|ROLE|>content<|end|>`; `<|end|>` ends a response (eos). There is no beginning-of-text token. Other
    characters are left out by `encode`: they have no token.

    The class has to be Qwen2's own: transformers loads the tokenizer of every qwen2 directory as that class, whatever
    the directory says, and so does vLLM. It is a byte-level BPE, here without any merge: a byte, a token.
    """
    byte_level = CHARACTERS.replace("\n", "\u010a").replace(" ", "\u0120")  # how byte-level BPE spells these two
    vocabulary = {token: index for index, token in enumerate([PAD, UNKNOWN, END, *ROLE_TOKENS, *byte_level])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens=list(ROLE_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
