import numpy as np

from rlhf_dist.scoring.diversity import distinct_pairs, text_hashes


def test_distinct_pairs_by_hand():
    """`a b a b` has the pairs ab, ba, ab: two of three differ."""
    got = distinct_pairs(["a b a b", "a b c", "one", "", "x x x x x"])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [2 / 3, 1, 1, 1, 1 / 4])


def test_hashes_are_equal_for_equal_texts_only():
    got = text_hashes(["ä b", "ä b", "a b", ""])
    assert got.dtype == np.uint64
    assert got[0] == got[1] and len(set(got.tolist())) == 3
