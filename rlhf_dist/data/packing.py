"""Which rows go where: ranks and micro-batches balanced by tokens. Pure; lengths in, row indices out.

Everything begins with the longest-processing-time rule (Graham 1969): longest row first, each onto the lightest part.
Where that leaves a part too full, rows are moved and exchanged between the fullest part and light ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

LEVEL = 0.005
"""Ranks are level when none has more than this share of tokens above the mean."""
PARTNERS = 16
"""Lightest parts that are tried to relieve the fullest one."""


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
    level = int(lengths.sum() / ranks * (1.0 + LEVEL))
    shards = relieved(lengths, split_rows(lengths, ranks), level)
    packed = [pack(lengths[shard], budget) for shard in shards]
    count = max(len(parts) for parts in packed)
    planned = []
    for shard, parts in zip(shards, packed, strict=True):
        even = _fill(lengths[shard], budget, count)
        empty = [np.empty(0, np.int64)] * (count - len(parts))
        planned.append([shard[part] for part in even or [*parts, *empty]])
    return planned


def relieved(lengths: np.ndarray, parts: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """The same rows in as many parts, none above `limit` tokens where moving and exchanging single rows can bring that.

    Again and again the fullest part gives a row to one of the `PARTNERS` lightest, or exchanges one for a shorter one,
    so that the two come as close as they can. No part becomes fuller than the fullest was. Deterministic.
    """
    parts = list(parts)
    loads = np.array([int(lengths[part].sum()) for part in parts], np.int64)
    while len(parts) > 1 and loads.max() > limit:
        full = int(loads.argmax())
        given = lengths[parts[full]]
        for light in np.argsort(loads, kind="stable")[:PARTNERS].tolist():
            taken = np.append(lengths[parts[light]], 0)  # the last: nothing comes back
            moved = given[:, None] - taken[None, :]
            left = np.abs(loads[full] - loads[light] - 2 * moved)
            at, back = np.unravel_index(int(left.argmin()), left.shape)
            if left[at, back] < loads[full] - loads[light]:
                break
        else:
            return parts
        mine, other = parts[full], parts[light]
        parts[full] = np.sort(np.concatenate([np.delete(mine, at), other[back : back + 1]]))
        parts[light] = np.sort(
            np.concatenate([np.delete(other, [back] if back < len(other) else []), mine[at : at + 1]])
        )
        loads[full] -= moved[at, back]
        loads[light] += moved[at, back]
    return parts


def _fill(lengths: Sequence[int] | np.ndarray, budget: int, count: int) -> list[np.ndarray] | None:
    """Exactly `count` micro-batches within the budget, the largest first, or None when it cannot be done this way."""
    lengths = np.asarray(lengths, np.int64)
    alone, rest = np.flatnonzero(lengths > budget), np.flatnonzero(lengths <= budget)
    shared = count - len(alone)
    if shared < 0 or int(lengths[rest].sum()) > shared * budget:
        return None
    parts = [alone[i : i + 1] for i in range(len(alone))]
    if shared:
        parts += [rest[p] for p in relieved(lengths[rest], split_rows(lengths[rest], shared), budget)]
    if any(len(part) > 1 and int(lengths[part].sum()) > budget for part in parts):
        return None
    return sorted(parts, key=lambda part: (-int(lengths[part].sum()), -len(part)))
