from fractions import Fraction

import pytest

from rlhf_dist.scoring.answers import answer_numeral, final_numeral, unreadable_answer
from rlhf_dist.scoring.rules import number_match

READ = {
    "42": "42",
    "42.": "42",
    "+5": "5",
    "-7": "-7",
    "\u22127": "-7",
    "-$7": "-7",
    "$-7": "-7",
    "1,234": "1234",
    "1,234.5.": "1234.5",
    ".5": "1/2",
    "007": "7",
    "1e3": "1000",
    "2.5E-3": "1/400",
    "2.5 × 10^3": "2500",
    r"6 \times 10^{-2}": "3/50",
    "10³": "1000",
    "3/4": "3/4",
    "3 / 4": "3/4",
    "-3/4": "-3/4",
    "3/-4": "-3/4",
    "1 1/2": "3/2",
    "-1 1/2": "-3/2",
    "1 and 1/2": "3/2",
    "½": "1/2",
    "1½ cups": "3/2",
    "3⁄4": "3/4",
    r"\frac{3}{4}": "3/4",
    r"$-\dfrac{3}{4}$": "-3/4",
    r"\frac34": "3/4",
    r"2\tfrac{1}{3}": "7/3",
    r"\boxed{\frac{3}{4}}": "3/4",
    r"so \(x\) is \boxed{x = 1{,}234}": "1234",
    r"12\text{ km}": "12",
    r"90^\circ": "90",
    "12 km": "12",
    "12km": "12",
    "60 km/h": "60",
    "9.8 m/s^2": "9.8",
    "5 m²": "5",
    "$5": "5",
    "5 dollars": "5",
    "€5": "5",
    "5 €": "5",
    "x = 5": "5",
    "3/4 of the cake": "3/4",
    "<<1+1=2>>\n#### 2": "2",
    "#### $2,000": "2000",
}
"""Answer -> its value."""

UNREAD = {
    "none": "it has no number",
    "nan": "it has no number",
    "five": "it has no number",
    "H2O": "it has no number",
    "3:30": "'3:30' is a time or a ratio",
    "12:30:15": "is a time or a ratio",
    "3 pm": "'pm' beside the number is not a unit",
    "2024-01-05": "is a date",
    "12/05/2024": "is a date",
    "1.2.3": "is a version or an address",
    "192.168.0.1": "is a version or an address",
    "3-4": "'3-4' is a range or a subtraction",
    "3\u20134": "is a range or a subtraction",
    "3 - 4": "is a range or a subtraction",
    "3 to 4": "it has 2 numbers, '3' and '4'",
    "3 or 4": "it has 2 numbers",
    "1,2,3": "it has 3 numbers, '1' and '2', ...",
    "1,23": "it has 2 numbers",
    "1.234,56": "it has 2 numbers",
    "5 feet 3 inches": "it has 2 numbers",
    "3/0": "'3/0' is a division by zero",
    r"\frac{1}{0}": "is a division by zero",
    "1e999999999": "is too long or too large",
    "10^99999": "is too long or too large",
    "9" * 5000: "is too long or too large",
    "2^5": "is an expression",
    "2+3": "is an expression",
    "2 x 3": "is an expression",
    "√2": "is an expression",
    r"2\sqrt{3}": "is an expression",
    r"\frac{x}{2}": "is an expression",
    "2π": "is an expression",
    "±5": "is an expression",
    "0x1F": "is an expression",
    "1_000": "is an expression",
    "2x": "'x' beside the number is not a unit",
    "1st": "'st' beside the number is not a unit",
    "about 5": "'about' beside the number is not a unit",
    ">5": "'>' beside the number is not a unit",
    "(5)": "beside the number is not a unit",
    "5%%": "'%' beside the number is not a unit",
    "99 #### none": "it has no number",
    r"5 \boxed{}": "it has no number",
    "": "it is empty",
    " \n": "it is empty",
}
"""Answer -> words of the reason."""


@pytest.mark.parametrize(("answer", "value"), READ.items())
def test_an_answer_that_is_one_number_is_read(answer, value):
    assert unreadable_answer("number", answer) is None
    numeral = answer_numeral(answer)
    assert numeral is not None and numeral.value == Fraction(value)
    assert number_match([f"It is {value}."], [answer]).tolist() == [1]
    assert number_match([answer, f"{value}9"], [answer] * 2).tolist() == [1, 0]


@pytest.mark.parametrize(("answer", "words"), UNREAD.items())
def test_an_answer_that_is_not_one_number_has_a_reason(answer, words):
    assert words in str(unreadable_answer("number", answer))
    assert answer_numeral(answer) is None


def test_other_kinds_compare_text_or_nothing():
    assert unreadable_answer("exact", "none") is None
    assert unreadable_answer("exact", " ") == "it is empty"
    assert unreadable_answer("regex", "") is None


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("first 1, then 2", "2"),
        ("1,2,3", "3"),
        ("1,234,5678", "5678"),
        ("it takes 5 hours, at 3:30 on 2024-01-05 with version 1.2.3", "5"),
        ("3:30", None),
        ("5 minutes, pages 3-4", None),
        ("10-7", None),
        ("10 - 7 = 3", "3"),
        ("2+3", None),
        ("7, or 2^5", None),
        ("7, or 3/0", None),
        ("7 1e999999999", None),
        (r"7 and \sqrt{2}", None),
        ("x^2 and H2O", None),
        ("5 m2 or m^2", "5"),
        ("**72**", "72"),
        ("_72_", "72"),
        ("答案是72。", "72"),
        ("A3: 12", "12"),
        ("#### 3/4", "3/4"),
        ("#### 72 apples out of 80", "72"),
        ("#### 3-4", None),
        ("#### 1,2", None),
        ("#### 3:30 after 5", None),
        (r"#### \boxed{5}", "5"),
        (r"\boxed{5} and not 6", "5"),
        (r"\boxed{4} \boxed{5}", "5"),
        (r"\boxed{3, 4}", None),
        (r"5 \boxed{none}", None),
        (r"\boxed{5", None),
        ("", None),
    ],
)
def test_what_of_a_response_counts(response, value):
    numeral = final_numeral(response)
    assert (None if numeral is None else numeral.value) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        ("3/4", ["3/4", "0.75", "#### 3/4", r"\boxed{\frac{6}{8}}", "75%"], ["4", "1/4", "The answer is 1/4.", "3"]),
        ("50%", ["50%", "50 percent", "50", "0.5", "1/2", r"50\%"], ["0.5%", "5", "5000%"]),
        ("50", ["50%", "50.0"], ["0.5"]),
        ("0.5", ["50%", "1/2", "0.5%"], ["50", "5%"]),
        ("3 million", ["3,000,000", "3", "3000 thousand"], ["3 thousand", "30"]),
        ("8", ["8 dozen eggs", "$8k"], ["96"]),
        ("0.1", ["1/10", "0.10"], ["0.1000000000000000000001"]),
        ("1/3", [r"\frac{2}{6}"], ["0.3333"]),
        ("12 km", ["12", "12 miles"], ["12000 m"]),
    ],
)
def test_values_are_compared_exactly(answer, right, wrong):
    assert number_match(right, [answer] * len(right)).tolist() == [1] * len(right)
    assert number_match(wrong, [answer] * len(wrong)).tolist() == [0] * len(wrong)
