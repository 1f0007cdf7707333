"""Inputs that nobody thought of, for the tests named test_fuzz_*: a few in every run, many with `--faults`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings, strategies as st

ODD = ["\u2028", "\x00", "\ud800", "\ufeff", "\r\n", "\r", "\t", *'{}[],:"\\\n ', "9" * 20]


def search(examples: int, check: Callable[[Any], None], inputs: st.SearchStrategy[Any]) -> None:
    """Call `check` with so many inputs. What it raises is raised, for the smallest input that was found."""
    allowed = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=examples, suppress_health_check=allowed)(given(inputs)(check))()


@st.composite
def mutated(draw: Any, texts: Sequence[str], most: int = 4) -> str:
    """One of the texts, with a few pieces taken out, doubled, replaced or put in."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, most))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.integers(0, 12)))
        piece = draw(st.sampled_from(ODD) | st.text(max_size=4) | st.just(text[begin:end] * 2) | st.just(""))
        text = text[:begin] + piece + text[end:]
    return text
