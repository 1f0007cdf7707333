"""Which rows go where: ranks and micro-batches balanced by tokens. Pure; lengths in, row indices out.

Everything rests on the longest-processing-time rule (Graham 1969): longest row first, each onto the lightest part.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np


def split_rows(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """Cut rows into `parts` of about equal tokens.

    lengths: int [B] tokens of each row. Returns `parts` arrays int64 of row indices, ascending, possibly empty; every
    row is in exactly one. Deterministic. No part holds more than the mean plus the longest row.
    """
    assert parts >= 1, parts
    heap = [(0, 0, part) for part in range(parts)]  # tokens, rows, part: equal tokens go by rows
    members: list[list[int]] = [[] for _ in range(parts)]
    for row in np.argsort(-np.asarray(lengths, np.int64), kind="stable").tolist():
        tokens, rows, part = heap[0]
        members[part].append(row)
        heapq.heapreplace(heap, (tokens + int(lengths[row]), rows + 1, part))
    return [np.array(sorted(rows), np.int64) for rows in members]


def pack(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Cut rows into few micro-batches of at most `budget` tokens each, of about equal size, the largest first.

    lengths: int [B] tokens. A row longer than the budget goes alone. Returns arrays int64 of row indices, ascending.
    """
    low, high = 0, len(lengths)
    while low < high:  # the fewest micro-batches that hold; one row each always does
        count = (low + high) // 2
        low, high = (low, count) if _fill(lengths, budget, count) is not None else (count + 1, high)
    filled = _fill(lengths, budget, high)
    assert filled is not None
    return filled


def plan(lengths: np.ndarray, ranks: int, budget: int) -> list[list[np.ndarray]]:
    """Cut a batch into micro-batches for every rank: result[rank][micro_batch] are row indices, int64, ascending.

    lengths: int [B] tokens; budget: tokens of a micro-batch, a longer row goes alone. Every row is in exactly one
    micro-batch. Every rank has the same number of micro-batches, since collectives need every rank; a rank with too few
    rows has empty ones at the end. Micro-batches of a rank descend in size, so that ranks work on like sizes at a time.
    """
    lengths = np.asarray(lengths, np.int64)
    shards = split_rows(lengths, ranks)
    count = max(len(pack(lengths[shard], budget)) for shard in shards)
    planned = []
    for shard in shards:
        # One part more never makes the fullest part fuller, so what fits in fewer fits in `count`.
        parts = _fill(lengths[shard], budget, count)
        assert parts is not None
        planned.append([shard[part] for part in parts])
    return planned


def _fill(lengths: Sequence[int] | np.ndarray, budget: int, count: int) -> list[np.ndarray] | None:
    """Exactly `count` micro-batches within the budget, the largest first, or None when it cannot be done this way."""
    lengths = np.asarray(lengths, np.int64)
    alone, rest = np.flatnonzero(lengths > budget), np.flatnonzero(lengths <= budget)
    shared = count - len(alone)
    if shared < 0 or (shared == 0 and len(rest) > 0):
        return None
    parts = [alone[i : i + 1] for i in range(len(alone))]
    if shared:
        parts += [rest[p] for p in split_rows(lengths[rest], shared)]
    if any(len(part) > 1 and int(lengths[part].sum()) > budget for part in parts):
        return None
    return sorted(parts, key=lambda part: (-int(lengths[part].sum()), -len(part)))
