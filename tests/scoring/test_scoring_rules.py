from fractions import Fraction

import numpy as np
import pytest

from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.answers import final_numeral
from rlhf_dist.scoring.rules import exact_match, number_match


def test_exact_match_ignores_only_the_space_around():
    got = exact_match([" cba\n", "cb a", "CBA", ""], ["cba"] * 4)
    assert got.dtype == np.float32
    assert got.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("it is 42.", "42"),
        ("first 1, then 2", "2"),
        ("2.0", "2"),
        ("$1,234.50.", "1234.5"),
        ("1,2,3", "3"),
        ("1,234,5678", "5678"),
        ("-7", "-7"),
        ("−7", "-7"),
        ("-$7", "-7"),
        ("$-7", "-7"),
        ("10 -7", "-7"),
        ("- 7 apples", "7"),
        (".5", "0.5"),
        ("1e3", "1000"),
        ("x=3\n#### 72 apples out of 80", "72"),
        ("#### 1 no: #### $2,000", "2000"),
        ("99 #### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, value):
    numeral = final_numeral(text)
    assert (numeral and numeral.value) == (None if value is None else Fraction(value))


def test_number_match_compares_values():
    responses = ["2.0", "two", "so 2", "3", "0.1+0.2 = 0.30"]
    assert number_match(responses, ["2", "2", "<<1+1=2>>\n#### 2", "2", "0.3"]).tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(RewardError, match="cannot compare with the prompt's answer 'abc': it has no number"):
        number_match(["1"], ["abc"])


def test_long_numbers_are_compared_exactly():
    assert number_match(["9007199254740993"], ["9007199254740992"]).tolist() == [0]
