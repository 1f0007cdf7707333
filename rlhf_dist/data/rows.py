"""What a row of a file means: a question, a demonstration or plain text. Complaints start with the row's place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rlhf_dist.config.schema import DataConfig
from rlhf_dist.data.numeric_answers import number_text
from rlhf_dist.data.records import Row, shown
from rlhf_dist.errors import DataError
from rlhf_dist.types import Message

ROLES = ("system", "user", "assistant")
REASONING = "write the reasoning into content, as the model is to write it (<think>...</think> before the answer)"
TOOLS = "tool calls are not supported: write the call into content as the model is to write it, or take the row out"
WEIGHT = "sft learns the closing assistant turn of a row and nothing else: split the row, or take the key out"
MORE_KEYS = {
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "thought"), REASONING),
    **dict.fromkeys(("tool_calls", "tool_call_id", "function_call", "tools"), TOOLS),
    **dict.fromkeys(("weight", "train", "loss", "mask"), WEIGHT),
    **dict.fromkeys(("audio", "images", "image", "video"), "only text is supported; take the row out"),
    "name": "write the name into content, or take the key out",
}
"""Key of a turn that is rejected -> the way out."""
OF_A_CONVERSATION = {
    **dict.fromkeys(("tools", "functions"), TOOLS),
    "documents": "write the documents into a turn, as the model is to read them, or take the column out",
    "system": "make it the first turn, or take the column out",
}
"""Column beside a conversation that belongs to it and would not be used -> the way out."""
FINAL = "####"
"""GSM8K writes the final answer of a worked solution after this mark."""
GSM8K_COLUMNS = "data.source=gsm8k wants question and answer; data.source=jsonl lets you name the columns"


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, with what a rule compares with."""

    messages: tuple[Message, ...]
    """Never empty; ends with a user turn."""
    answer: str
    """Empty when the data has none."""


@dataclass(frozen=True, slots=True)
class Demonstration:
    """What to say, for supervised training."""

    messages: tuple[Message, ...]
    """Ends with a user turn; empty for plain text."""
    response: str
    """The text to learn; never empty."""
    place: str = field(default="", compare=False)
    """Where it came from, for messages; empty for a built-in task's."""


def ask(text: str, system: str) -> tuple[Message, ...]:
    """A conversation of one user turn, behind the system turn unless that is empty."""
    user = Message("user", text)
    return (Message("system", system), user) if system else (user,)


def question(row: Row, config: DataConfig) -> Question:
    """The question of a row. Raises DataError naming its place, what is wrong and what would be right."""
    if config.source == "gsm8k":
        return Question(ask(text_field(row, "question", hint=GSM8K_COLUMNS), config.system), _final_answer(row))
    messages = _conversation(row, config) if _has_messages(row, config) else _prompt(row, config)
    if messages[-1].role != "user":
        raise DataError(
            f"{row.place}: {config.messages_key!r} ends with a turn of {messages[-1].role!r}; "
            "a prompt has to end with a user turn"
        )
    return Question(messages, _answer(row, config))


def demonstration(row: Row, config: DataConfig) -> Demonstration:
    """A prompt with its response: `response_key`, or the closing assistant turn of `messages_key`. Raises DataError."""
    if config.source == "gsm8k":
        _final_answer(row)  # a worked answer without its final line is a broken row
        asked = ask(text_field(row, "question", hint=GSM8K_COLUMNS), config.system)
        return Demonstration(asked, text_field(row, "answer", hint=GSM8K_COLUMNS), row.place)
    if not _has_messages(row, config):
        return Demonstration(_prompt(row, config), _response(row, config), row.place)
    messages = _conversation(row, config)
    if messages[-1].role == "user":
        return Demonstration(messages, _response(row, config), row.place)
    before = messages[:-1]
    if messages[-1].role != "assistant" or not before or before[-1].role != "user":
        raise DataError(
            f"{row.place}: {config.messages_key!r} ends with the roles {[m.role for m in messages[-2:]]}; "
            "a demonstration has to end with a user turn and an assistant turn"
        )
    if row.fields.get(config.response_key) is not None:
        raise DataError(
            f"{row.place}: has both a closing assistant turn in {config.messages_key!r} and "
            f"{config.response_key!r}; keep one of them"
        )
    return Demonstration(before, messages[-1].content, row.place)


def plain_text(row: Row, config: DataConfig) -> Demonstration:
    """The text in `response_key`, without a prompt. Raises DataError."""
    return Demonstration((), _response(row, config), row.place)


def _has_messages(row: Row, config: DataConfig) -> bool:
    # Parquet and datasets store an absent value as null.
    return bool(config.messages_key) and row.fields.get(config.messages_key) is not None


def _prompt(row: Row, config: DataConfig) -> tuple[Message, ...]:
    hint = "data.prompt_key or data.messages_key; name the column that has it"
    return ask(text_field(row, config.prompt_key, beside=config.messages_key, hint=hint), config.system)


def _response(row: Row, config: DataConfig) -> str:
    return text_field(row, config.response_key, hint="data.response_key; name the column that has it")


def _conversation(row: Row, config: DataConfig) -> tuple[Message, ...]:
    return behind_system(row, config.messages_key, conversation(row, config.messages_key), config.system)


def conversation(row: Row, key: str) -> tuple[Message, ...]:
    """The turns in a column that holds a list of {role, content}; never empty. Raises DataError."""
    value = row.fields[key]
    if not isinstance(value, list) or not value:
        raise DataError(f"{row.place}: {key!r} is {shown(value)}; it has to be a list of {{role, content}}")
    for column, way in OF_A_CONVERSATION.items():
        if column != key and row.fields.get(column) not in (None, "", [], {}):
            raise DataError(f"{row.place}: has {column!r} beside {key!r}, which would not be used; {way}")
    return tuple(_message(row, f"{key}[{i}]", item) for i, item in enumerate(value))


def behind_system(row: Row, key: str, messages: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """The turns behind the system turn, unless that is empty. Raises DataError when they bring one of their own."""
    if not system:
        return messages
    if messages[0].role == "system":
        raise DataError(f"{row.place}: {key!r} begins with a system turn and data.system is set too; keep one of them")
    return (Message("system", system), *messages)


def _message(row: Row, name: str, item: object) -> Message:
    if not isinstance(item, dict) or not {"role", "content"} <= item.keys():
        raise DataError(f"{row.place}: {name} is {shown(item)}; it has to be an object with role and content")
    _require_no_more(row, name, item)
    role = item["role"]
    if role not in ROLES:
        raise DataError(f"{row.place}: {name} has the role {shown(role)}; it has to be one of {', '.join(ROLES)}")
    content = item["content"]
    if isinstance(content, list):
        raise DataError(
            f"{row.place}: the content of {name} is a list of parts, {shown(content)}; it has to be one text: join the "
            "text of its parts (images and audio are not supported)"
        )
    return Message(role, checked_text(row, f"the content of {name}", content))


def _require_no_more(row: Row, name: str, item: dict[str, object]) -> None:
    """A turn is its role and its content: whatever else it holds would be lost. Raises DataError."""
    # Tables store an absent value as null, and an absent list as an empty one.
    more = [key for key, value in item.items() if key not in ("role", "content") and value not in (None, "", [], {})]
    if more:
        way = MORE_KEYS.get(more[0], "take the key out")
        raise DataError(
            f"{row.place}: {name} has {', '.join(map(repr, more))} beside role and content, which would not be used; "
            f"{way}"
        )


def text_field(row: Row, key: str, beside: str = "", hint: str = "") -> str:
    """The text in a column, never empty. Raises DataError.

    `beside`: the column that could have stood in its place; `hint`: the config key that names it, and the way out.
    """
    return checked_text(row, repr(key), value_of(row, key, beside, hint))


def value_of(row: Row, key: str, beside: str = "", hint: str = "") -> object:
    """What is in a column. Raises DataError when there is nothing; `beside` and `hint` as for `text_field`."""
    value = row.fields.get(key)
    if value is None:
        keys = ", ".join(k for k, v in row.fields.items() if v is not None) or "nothing"
        missing = f"{key!r} or {beside!r}" if beside else repr(key)
        raise DataError(f"{row.place}: lacks {missing}; it has {keys}" + (f" ({hint})" if hint else ""))
    return value


def checked_text(row: Row, name: str, value: object) -> str:
    """`value`, when it is text that is not empty and can be encoded; `name` says what it is. Raises DataError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{row.place}: {name} is {value}, as tables have it for a missing value; it has to be text")
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {name} is {shown(value)} ({type(value).__name__}); it has to be text")
    if not value.strip():
        raise DataError(f"{row.place}: {name} is empty; it has to be some text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{row.place}: {name} holds half a surrogate pair at character {error.start}") from error
    return value


def _answer(row: Row, config: DataConfig) -> str:
    """Numbers are taken as their text. An empty answer is refused: an empty response would match it."""
    key = config.answer_key
    if not key:
        return ""
    try:
        number = number_text(row, key)
        return text_field(row, key) if number is None else number
    except DataError as error:
        raise DataError(f"{error} (data.answer_key; set it empty when the data has no answers)") from error


def _final_answer(row: Row) -> str:
    final = text_field(row, "answer", hint=GSM8K_COLUMNS).rpartition(FINAL)
    if not final[1] or not final[2].strip():
        raise DataError(f"{row.place}: 'answer' has no final answer after {FINAL}; GSM8K ends each with '{FINAL} 42'")
    return final[2].strip()
