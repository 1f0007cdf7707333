import math

import pytest

from rlhf_dist.models.score_scale import NO_SCALE, ScoreScale, parse_scale


@pytest.mark.parametrize(
    ("scale", "divisor", "words"),
    [
        (NO_SCALE, 1.0, []),
        (ScoreScale(0.3, 1.7, 0.8, 0.7, 0.9), 1.7, []),
        (ScoreScale(0.3, 1.7, 0.52, 0.47, 0.57), 1.7, ["0.520 (95%: 0.470 to 0.570), is not above chance, 0.5"]),
        (ScoreScale(0.3, 1.7, 0.3, 0.2, 0.4), 1.7, ["is not above chance"]),
        (ScoreScale(0.3, 0.001, 0.9, 0.8, 0.95), 1.0, ["hardly differ, their deviation is 0.001"]),
        (ScoreScale(0.3, 0.001, 0.5, 0.4, 0.6), 1.0, ["is not above chance", "hardly differ"]),
        (ScoreScale(0.3, 1.7, None, None, None, 0.4, 0.1, 0.6), 1.7, []),
        (
            ScoreScale(0.3, 1.7, None, None, None, 0.1, -0.1, 0.3),
            1.7,
            ["correlation with the ratings, 0.100 (95%: -0.100 to 0.300), is not above 0"],
        ),
        (ScoreScale(0.3, 1.7, None, None, None, -0.5, -0.7, -0.3), 1.7, ["is not above 0"]),
        (ScoreScale(0.3, 1.7, None, None, None, 0.9, -1.0, 1.0), 1.7, ["fewer than 4 held-out ratings, too few"]),
        (ScoreScale(0.3, 1.7, 0.8, 0.7, 0.9, 0.0, -0.2, 0.2), 1.7, ["is not above 0"]),
        (ScoreScale(0.3, 1e-30), 1.0, ["hardly differ"]),
        (ScoreScale(0.3, math.nan), 1.0, ["hardly differ"]),
    ],
)
def test_what_gives_reason_to_doubt_is_named_and_never_divided_by(scale, divisor, words):
    assert scale.divisor == divisor
    found = scale.doubts()
    assert len(found) == len(words) and all(word in told for word, told in zip(words, found, strict=True))


def test_what_is_stored_is_read_again():
    for scale in (
        ScoreScale(0.3, 1.7),
        ScoreScale(0.3, 1.7, 0.8, 0.7, 0.9),
        ScoreScale(0, 1, None, None, None, 0.5, 0.4, 0.6),
    ):
        assert parse_scale(scale.stored()) == scale
    assert ScoreScale(0.3, 1.7).stored() == {"score_mean": 0.3, "score_std": 1.7}
    for stored in (None, "large", {}, {"score_mean": 1.0}, {"score_mean": 0.0, "score_std": 0.0}):
        assert parse_scale(stored) is None
    for value in (-1.0, math.nan, math.inf, "x", None):
        assert parse_scale({"score_mean": 0.0, "score_std": value}) is None
        assert parse_scale({"score_mean": value, "score_std": 1.0}) in (None, ScoreScale(-1.0, 1.0))
