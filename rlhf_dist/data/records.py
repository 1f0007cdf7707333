"""One record of a data file with its place, and one message for all that cannot be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf_dist.errors import DataError

LISTED = 5
"""Problems that a message names; the others are counted."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file."""

    place: str
    """`file:line` for JSONL, `file: row N` (from 1) for parquet and `datasets` directories."""
    fields: Mapping[str, Any]
    """Column -> value, as stored."""


def parsed(rows: Sequence[Row], parse: Callable[[Row], Item]) -> list[Item]:
    """What every row says. Raises one DataError for all rows of which `parse` raises one."""
    items: list[Item] = []
    problems: list[str] = []
    for row in rows:
        try:
            items.append(parse(row))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(listed(problems, len(rows)))
    return items


def listed(problems: Sequence[str], total: int, way_out: str = "") -> str:
    """One message for the rows that cannot be used, of `total`: the first few by name, and how many there are."""
    end = f"; {way_out}" if way_out else ""
    if len(problems) == 1:
        return problems[0] + end
    more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    head = f"{len(problems)} of {total} rows cannot be used{end}:"
    return "\n  - ".join([head, *problems[:LISTED], *more])


def together(reads: Iterable[Callable[[], Item]]) -> list[Item]:
    """What each gives. Raises one DataError for all that raise one."""
    items: list[Item] = []
    problems: dict[str, None] = {}
    for read in reads:
        try:
            items.append(read())
        except DataError as error:
            problems[str(error)] = None
    if problems:
        raise DataError("\n".join(problems))
    return items


def shown(value: object) -> str:
    """A value for a message: its repr, at most 80 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} that is nested very deeply"
    return text if len(text) <= 80 else text[:77] + "..."
