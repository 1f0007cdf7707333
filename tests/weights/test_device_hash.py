"""The hash of a bucket on a device: every change shows, and it does not depend on how the sums are cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st

from rlhf_dist.weights import device_hash
from rlhf_dist.weights.device_hash import BLOCK, SUMS, DeviceHash, block_keys

HASH = DeviceHash(torch.device("cpu"))
WORDS = 2 * BLOCK + 48
"""Two blocks, and a part of one."""
M64 = 2**64


def bucket(seed: int = 0, words: int = WORDS) -> torch.Tensor:
    return torch.randint(0, 256, (4 * words,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


BUCKET, FOUND = bucket(), HASH(bucket())


@given(st.integers(0, 4 * WORDS - 1), st.integers(0, 7))
def test_a_flipped_bit_shows(byte: int, bit: int) -> None:
    other = BUCKET.clone()
    other[byte] ^= 1 << bit
    assert HASH(other) != FOUND


@given(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1), st.integers(1, 7))
def test_swapped_and_moved_words_show(first: int, second: int, count: int) -> None:
    words = BUCKET.view(torch.int32)
    other = words.clone()
    other[first], other[second] = words[second], words[first]
    assert (HASH(other.view(torch.uint8)) == FOUND) == torch.equal(other, words)
    assert HASH(words.roll(count).view(torch.uint8)) != FOUND


@given(st.integers(0, WORDS - 1), st.integers(0, WORDS - 1))
def test_two_signs_that_are_turned_show(first: int, second: int) -> None:
    """The highest bit of a sum modulo 2^64 alone would be turned twice."""
    words = BUCKET.view(torch.int32).clone()
    for place in {first, second}:
        words[place] ^= -(2**31)
    assert HASH(words.view(torch.uint8)) != FOUND


def test_blocks_that_change_places_show() -> None:
    first, second = BUCKET[: 4 * BLOCK], BUCKET[4 * BLOCK : 8 * BLOCK]
    assert HASH(torch.cat([second, first, BUCKET[8 * BLOCK :]])) != FOUND


def test_zeros_at_the_end_show() -> None:
    zeros = torch.zeros(4 * BLOCK, dtype=torch.uint8)
    assert len({HASH(zeros[: 64 * count]) for count in range(20)}) == 20


def test_the_sums_are_those_of_exact_integers() -> None:
    part = bucket(1, 300)
    words, keys = part.view(torch.int32).tolist(), block_keys().tolist()
    expected = [sum(word * key for word, key in zip(words, own, strict=False)) % M64 for own in keys]
    assert [value % M64 for value in HASH._sums(part.view(torch.int32))[0].tolist()] == expected
    assert len({key for own in keys for key in own}) == SUMS * BLOCK and block_keys().shape == (SUMS, BLOCK)


def test_it_is_the_same_in_strips_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU takes more at a time."""
    monkeypatch.setattr(device_hash, "STRIP", {"cpu": 1})
    assert DeviceHash(torch.device("cpu"))(BUCKET) == FOUND and len(FOUND) == 32
