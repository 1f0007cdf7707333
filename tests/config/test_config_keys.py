"""What keys say of themselves: ranges and rules, from the metadata of fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from rlhf_dist.config.effects import at_most, needed, one_of, only, where
from rlhf_dist.config.keys import ANY, COUNT, given, key, key_problems, range_problems, used_by


@dataclass(frozen=True)
class Inner:
    mode: str = "off"
    size: int = key(4, COUNT, where("inner.mode", one_of("on"), "take it out", ", which has no size"))
    share: float = key(0.5, ANY)
    least: int = key(1, COUNT, at_most("inner.size", lambda c: c.inner.mode == "on"))
    secret: bool = key(
        False,
        only(lambda c: c.inner.mode != "on", " with {c.inner.mode}"),
        only(lambda c: c.inner.size == 4, " twice"),
    )


@dataclass(frozen=True)
class Whole:
    name: str = key("x", needed("give one, for {c.inner.mode}"))
    inner: Inner = field(default_factory=Inner, metadata=used_by("train"))


def test_the_keys_of_a_config_are_named_in_full() -> None:
    names = ["name", "inner.size", "inner.share", "inner.least", "inner.secret"]
    assert [key.name for key in given(Whole())] == names
    assert [key.name for key in given(Whole(), command="sft")] == ["name"]
    assert next(given(Inner(), "part.")).name == "part.size"


@pytest.mark.parametrize(
    ("inner", "found"),
    [
        (Inner(size=0), "inner.size is 0; it must be at least 1"),
        (Inner(size=math.inf), "inner.size is inf; it must be a finite number, at least 1"),  # pyright: ignore[reportArgumentType]
        (Inner(share=math.nan), "inner.share is nan; it must be a finite number"),
    ],
)
def test_a_number_out_of_its_range_is_told(inner: Inner, found: str) -> None:
    assert list(range_problems(Whole(inner=inner))) == [found]


@pytest.mark.parametrize(
    ("whole", "found"),
    [
        (Whole(), []),
        (Whole(name=""), ["name is empty; give one, for off"]),
        (
            Whole(inner=Inner(size=5)),
            ["inner.size is 5 and has no effect with inner.mode off, which has no size; take it out"],
        ),
        (Whole(inner=Inner("on", size=5)), []),
        (Whole(inner=Inner(size=0)), []),  # out of its range, which is told of that alone
        (Whole(inner=Inner("on", least=5)), ["inner.least is 5; it must be at most inner.size, 4"]),
        (Whole(inner=Inner("on", secret=True)), ["inner.secret is true with on"]),
        (Whole(inner=Inner("on", size=3, secret=True)), ["inner.secret is true with on"]),
    ],
)
def test_the_first_rule_of_a_key_that_objects_is_told(whole: Whole, found: list[str]) -> None:
    assert list(key_problems(whole, command="train")) == found


def test_rules_of_a_section_are_for_the_commands_that_use_it() -> None:
    assert list(key_problems(Whole(inner=Inner(size=5)), command="eval")) == []
    assert len(list(key_problems(Whole(inner=Inner(size=5))))) == 1
