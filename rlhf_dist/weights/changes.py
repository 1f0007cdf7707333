"""The 16-bit words that changed between two versions of the weights: how they are written down, read and applied. Pure.

A word that changed is told by its distance from the one before it, in 16 bits, and its new value. Where most words stay
as they are, that is a small part of the whole.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_dist.errors import WeightSyncError

WORD_BYTES = 2
PAIR_BYTES = 2 * WORD_BYTES
"""Of a word that changed: its gap and its value."""
MOST_CHANGED = 0.25
"""Share of the words: above it the whole is published. A word that changed takes four bytes, in the whole two."""
FAR = 0xFFFF
"""A gap that only goes so many words on: none of them has changed."""
COUNT = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class Piece:
    """Changes in a run of words."""

    start: int
    """Where the run begins in the layout of the whole, in words."""
    gaps: np.ndarray
    """uint16: words that stay as they are before each one that changed; `FAR` has no value of its own."""
    values: np.ndarray
    """uint16, one for each gap that is not `FAR`."""


def encode(start: int, positions: np.ndarray, values: np.ndarray) -> Piece:
    """`positions`: int64 [N], ascending, from `start` on; `values`: uint16 [N]."""
    before = np.diff(positions, prepend=-1) - 1
    far, near = np.divmod(before, FAR)
    gaps = np.full(len(positions) + int(far.sum()), FAR, dtype=np.uint16)
    gaps[np.cumsum(far) + np.arange(len(positions))] = near
    return Piece(start, gaps, np.ascontiguousarray(values, dtype=np.uint16))


def decode(piece: Piece) -> np.ndarray:
    """The positions, int64 [N], from the piece's start on."""
    near = piece.gaps != FAR
    return (np.cumsum(piece.gaps + near, dtype=np.int64) - 1)[near]


def apply(pieces: Iterable[Piece], words: np.ndarray, first: int = 0) -> None:
    """Write the changes into `words`, uint16 [N], whose first one is number `first` of the whole.

    Raises `WeightSyncError` for changes that do not lie in there, before any of that piece is written.
    """
    for piece in pieces:
        positions = decode(piece)
        positions += piece.start - first
        if len(positions) != len(piece.values) or (
            len(positions) and not 0 <= positions[0] <= positions[-1] < len(words)
        ):
            raise WeightSyncError(f"the changed words from {piece.start} on do not fit the weights; they are damaged")
        words[positions] = piece.values


def pack(pieces: Sequence[Piece]) -> bytes:
    """As bytes: how many pieces, (start, gaps, values) of each, all gaps, all values."""
    table = np.array([(piece.start, len(piece.gaps), len(piece.values)) for piece in pieces], dtype="<i8")
    parts = [table, *(piece.gaps for piece in pieces), *(piece.values for piece in pieces)]
    return b"".join([COUNT.pack(len(pieces)), *(part.tobytes() for part in parts)])


def unpack(data: bytes | bytearray | memoryview) -> list[Piece]:
    """What `pack` made; the pieces read from `data`. Raises `WeightSyncError`."""
    try:
        (count,) = COUNT.unpack_from(data)
        table = np.frombuffer(data, "<i8", 3 * count, COUNT.size).reshape(count, 3)
        body = np.frombuffer(data, "<u2", offset=COUNT.size + table.nbytes)
        ends = np.cumsum(np.concatenate([table[:, 1], table[:, 2]]))
        if (table < 0).any() or (ends[-1] if count else 0) != len(body):
            raise ValueError("its table is of another length")
        runs = np.split(body, ends)
    except (ValueError, struct.error) as error:
        raise WeightSyncError(f"the changed words are damaged: {error}") from None
    starts = table[:, 0].tolist()
    return [Piece(start, runs[index], runs[count + index]) for index, start in enumerate(starts)]
