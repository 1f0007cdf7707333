"""Answers that are numbers: what a table program writes for whole and for missing ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

from rlhf_dist.data.records import Row, shown
from rlhf_dist.errors import DataError

EXACT = 2**53
"""Whole numbers below it are themselves as float64."""


def whole_answers(rows: Sequence[Row], key: str) -> Sequence[Row]:
    """The rows, with `4.0` in the answers' column as 4 where that column certainly held whole numbers.

    A table program turns a column of whole numbers with a missing one into floats. It is certain where every value is
    a number or missing, and all of the numbers are whole.
    """
    values = [row.fields.get(key) for row in rows] if key else []
    if not any(isinstance(value, float | Decimal) for value in values):
        return rows
    if not all(value is None or _missing(value) or _whole(value) is not None for value in values):
        return rows
    return [
        row if (whole := _whole(value)) is None else Row(row.place, {**row.fields, key: whole})
        for row, value in zip(rows, values, strict=True)
    ]


def number_text(row: Row, key: str) -> str | None:
    """The text of an answer that is a number; None for what is none. Raises DataError for a missing or inexact one."""
    value = row.fields.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    if isinstance(value, int):
        return str(value)
    if _missing(value):
        raise DataError(
            f"{row.place}: {key!r} is {value}, as tables have it for a missing value; give the answer, or take the row "
            "out"
        )
    if isinstance(value, float) and abs(value) >= EXACT:
        raise DataError(
            f"{row.place}: {key!r} is {shown(value)}, a float that does not hold all digits of so large a number; "
            "write the answer as text"
        )
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def ambiguous_whole(row: Row, key: str) -> bool:
    """Whether the answer is a float such as 4.0 that may stand for 4 (see `whole_answers` for where it is certain)."""
    value = row.fields.get(key)
    return isinstance(value, float | Decimal) and _whole(value) is not None


def _missing(value: object) -> bool:
    """NaN or infinity."""
    return isinstance(value, float | Decimal) and not math.isfinite(value)


def _whole(value: object) -> int | None:
    """The whole number that `value` certainly is; None for a fraction and for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or _missing(value):
        return None
    if isinstance(value, float) and abs(value) >= EXACT:
        return None
    return int(value) if value == int(value) else None
