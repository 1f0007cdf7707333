"""What somebody else's code gave as scores, as numbers.

Standard library only: the process of a user's function loads nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class NotNumbers(Exception):
    """What is wrong, as in `returned 1 values for 2 responses`."""


def plain_numbers(result: Any, responses: Sequence[str]) -> list[float]:
    """One number for each of the responses. Raises NotNumbers."""
    if not isinstance(result, list):
        raise NotNumbers(
            f"returned {short(result)} ({type(result).__name__}); it has to return a list of {len(responses)} numbers"
        )
    if len(result) != len(responses):
        raise NotNumbers(f"returned {len(result)} values for {len(responses)} responses")
    values = []
    for i, (value, response) in enumerate(zip(result, responses, strict=True)):
        number = _number(value)
        if number is None:
            wrong = f"not a number ({type(value).__name__})"
            raise NotNumbers(f"returned {short(value)}, {wrong}, for response {i}: {short(response)}")
        values.append(number)
    return values


def short(value: object) -> str:
    """Its `repr`, shortened for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _number(value: Any) -> float | None:
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except Exception:  # the value is the user's, and so is what its conversion may raise
        return None
