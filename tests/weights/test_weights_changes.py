"""Changed words: written down and read again, what is damaged, and how many bytes they take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.changes import COUNT, FAR, PAIR_BYTES, Piece, apply, decode, encode, pack, unpack


def made(positions: list[int], start: int = 0) -> Piece:
    return encode(start, np.array(positions, dtype=np.int64), np.arange(1, len(positions) + 1, dtype=np.uint16))


def test_gaps_by_hand() -> None:
    piece = made([0, 1, 5, 5 + FAR, 6 + 2 * FAR, 6 + 4 * FAR])
    assert piece.gaps.tolist() == [0, 0, 3, FAR - 1, FAR, 0, FAR, FAR - 1]
    assert piece.values.tolist() == [1, 2, 3, 4, 5, 6]
    assert decode(piece).tolist() == [0, 1, 5, 5 + FAR, 6 + 2 * FAR, 6 + 4 * FAR]


@given(
    st.lists(st.one_of(st.integers(0, 9), st.integers(FAR - 3, FAR + 3), st.integers(0, 4 * FAR)), max_size=30),
    st.integers(0, 1000),
)
def test_what_was_encoded_is_decoded(gaps: list[int], start: int) -> None:
    positions = [] if not gaps else (np.cumsum(np.array(gaps) + 1) - 1).tolist()
    (piece,) = unpack(pack([made(positions, start)]))
    assert decode(piece).tolist() == positions
    before = np.zeros(start + (positions[-1] if positions else 0) + 3, dtype=np.uint16)
    apply([piece], before)
    assert np.flatnonzero(before).tolist() == [start + at for at in positions]
    assert before[before > 0].tolist() == list(range(1, len(positions) + 1))


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=40), max_size=5))
def test_several_pieces_become_the_new_words(runs: list[list[bool]]) -> None:
    old = np.arange(sum(map(len, runs)), dtype=np.uint16)
    new, pieces, start = old.copy(), [], 0
    for run in runs:
        positions = np.flatnonzero(run)
        new[start + positions] += 1000
        pieces.append(encode(start, positions, new[start + positions]))
        start += len(run)
    data = pack(pieces)
    assert len(data) == COUNT.size + 24 * len(runs) + PAIR_BYTES * sum(map(sum, runs))
    apply(unpack(data), old)
    assert np.array_equal(old, new)


def test_a_part_of_the_whole() -> None:
    words = np.zeros(4, dtype=np.uint16)
    apply([made([1, 3], start=10)], words, first=10)
    assert words.tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize("start", [-1, 97])
def test_changes_outside_of_the_weights_are_refused_and_nothing_of_them_is_written(start: int) -> None:
    words = np.zeros(100, dtype=np.uint16)
    with pytest.raises(WeightSyncError, match=f"the changed words from {start} on do not fit the weights"):
        apply([made([0, 3], start)], words)
    assert not words.any()


def test_more_gaps_than_values_are_refused() -> None:
    with pytest.raises(WeightSyncError, match="do not fit"):
        apply([Piece(0, np.array([0, 0], np.uint16), np.array([1], np.uint16))], np.zeros(9, np.uint16))


@pytest.mark.parametrize("cut", [1, 2, 5, 20, 40])
def test_damaged_bytes_are_refused(cut: int) -> None:
    data = pack([made([0, 3]), made([5], 20)])
    with pytest.raises(WeightSyncError, match="the changed words are damaged"):
        unpack(data[:-cut])


def test_a_table_with_a_negative_length_is_refused() -> None:
    data = bytearray(pack([made([0, 3])]))
    data[COUNT.size + 8 : COUNT.size + 16] = (-2).to_bytes(8, "little", signed=True)
    with pytest.raises(WeightSyncError, match="damaged"):
        unpack(data)
