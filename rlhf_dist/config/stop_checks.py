"""Rules of `rollout.stop`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MOST_TEXTS = 64
MOST_CHARACTERS = 1000
"""Of one text; the engine compares each with what it has generated after every token."""


def stop_problems(stop: Sequence[str]) -> Iterator[str]:
    """A sentence for each stop text that cannot be meant, by its index."""
    if len(stop) > MOST_TEXTS:
        yield f"rollout.stop has {len(stop)} texts; it must have at most {MOST_TEXTS}"
    first: dict[str, int] = {}
    for i, text in enumerate(stop):
        key = f"rollout.stop[{i}]"
        if not text:
            yield f"{key} is ''; every response would end before its first token: take it out"
        elif len(text) > MOST_CHARACTERS:
            yield f"{key} is {text[:40]!r}..., {len(text)} characters; it must have at most {MOST_CHARACTERS}"
        elif text in first:
            yield f"{key} is {text!r}, as rollout.stop[{first[text]}] is; take one of them out"
        first.setdefault(text, i)
