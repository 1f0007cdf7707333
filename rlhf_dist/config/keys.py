"""What a key says of itself, in the metadata of its field: its range, and rules about where and how it may be set.

`key` declares it. `range_problems` and `key_problems` read it: one walk over a config for each. A problem that is no
single key's is a line in a table of `Problems`, or a function of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

if TYPE_CHECKING:  # schema.py declares its keys with this file
    from rlhf_dist.config.schema import Config

T = TypeVar("T")
Command = Literal["train", "sft", "reward", "prefer", "eval"]

Problems = Mapping[str, Callable[["Config"], object]]
"""A sentence, in which {c.algo.name} stands for the value of a key -> whether a config has that problem."""


@dataclass(frozen=True, slots=True)
class Range:
    """Which numbers are right."""

    right: str
    """In words, as in `at least 1`."""
    test: Callable[[float], bool]


ANY = Range("a finite number", math.isfinite)
COUNT = Range("at least 1", lambda x: x >= 1)
NOT_NEGATIVE = Range("0 or more", lambda x: x >= 0)
POSITIVE = Range("greater than 0", lambda x: x > 0)
LIMIT_S = Range("greater than 0 and at most 1e9", lambda x: 0 < x <= 1e9)
"""Seconds to wait; longer than some of Python's own waits can be told."""
LIMIT_S_OR_0 = Range("between 0 and 1e9", lambda x: 0 <= x <= 1e9)
SHARE = Range("between 0 and 1", lambda x: 0 <= x <= 1)
SHARE_ABOVE_0 = Range("greater than 0 and at most 1", lambda x: 0 < x <= 1)
SHARE_BELOW_1 = Range("at least 0 and less than 1", lambda x: 0 <= x < 1)


class Given(NamedTuple):
    """A key as a config has it."""

    name: str
    """In full, as in `algo.kl.coef`."""
    value: Any
    changed: bool
    """Whether it differs from the default."""
    shown: str
    """The value in a message."""
    right: Range | None
    """None: no number."""
    rules: tuple[Rule, ...]


Rule = Callable[[Any, Given], str]
"""(config, a key) -> a sentence, or nothing. For the keys of `scoring.rewards.NAME` the config is that reward."""


def plain(value: object) -> str:
    """A value as YAML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def unseen(value: object) -> str:
    """In place of a value that may be a secret."""
    return "set"


def key(default: T, *said: Range | Rule, shown: Callable[[Any], str] = plain) -> T:
    """A field of a section: its default, its range, its rules (the first that objects is told), how it is shown."""
    right = next((one for one in said if isinstance(one, Range)), None)
    rules = tuple(one for one in said if not isinstance(one, Range))
    return cast(T, field(default=default, metadata={"key": (right, rules, shown)}))


def used_by(*commands: Command) -> dict[str, Any]:
    """Metadata of a section whose rules are for these commands only."""
    return {"commands": commands}


def given(part: Any, prefix: str = "", command: str = "") -> Iterator[Given]:
    """The keys of `part`, a config or a section, that say something of themselves; with a command those it uses."""
    for one in fields(part):
        name, value = f"{prefix}{one.name}", getattr(part, one.name)
        if is_dataclass(value) and (not command or command in one.metadata.get("commands", (command,))):
            yield from given(value, f"{name}.", command)
        elif "key" in one.metadata:
            right, rules, shown = one.metadata["key"]
            yield Given(name, value, value != one.default, shown(value), right, rules)


def range_problems(part: Any, prefix: str = "") -> Iterator[str]:
    """A sentence for each number that is out of its range."""
    for one in given(part, prefix):
        if one.right and not in_range(one):
            finite = "" if math.isfinite(one.value) or one.right.right.startswith(ANY.right) else f"{ANY.right}, "
            yield f"{one.name} is {one.value}; it must be {finite}{one.right.right}"


def key_problems(part: Any, prefix: str = "", command: str = "", but: Container[Rule] = ()) -> Iterator[str]:
    """A sentence for each key that is set where it has no effect, or that its rules object to for another reason.

    None for a number that is out of its range, which is told of that alone. `but`: rules that are left out.
    """
    for one in given(part, prefix, command):
        if in_range(one):
            yield from [text for text in (rule(part, one) for rule in one.rules if rule not in but) if text][:1]


def in_range(key: Given) -> bool:
    """Whether it is in its range, where it has one."""
    return key.right is None or (math.isfinite(key.value) and key.right.test(key.value))


def told(problems: Problems, config: Config) -> Iterator[str]:
    """The sentences of those that `config` has."""
    return (sentence.format(c=config) for sentence, has in problems.items() if has(config))
