from importlib.util import find_spec

import pytest

from rlhf_dist.config.reward_words import reward_lines
from rlhf_dist.config.schema import Config, RewardSpec, ScoringConfig
from rlhf_dist.errors import ConfigError, RewardError
from rlhf_dist.scoring import verifier
from rlhf_dist.scoring.answers import unreadable_answer
from rlhf_dist.scoring.expressions import expression, given
from rlhf_dist.scoring.number import NumberReward
from rlhf_dist.scoring.verifier import AnswerReader

EXPRESSIONS = {
    r"\frac{\sqrt{3}}{2}": r"\frac{\sqrt{3}}{2}",
    "x+1": "x+1",
    "$x^2 + 1$.": "x^2 + 1",
    r"\boxed{2x}": "2x",
    "so\n#### x+1": "x+1",
    "[1, 2)": "[1, 2)",
    r"\{1,2\}": r"\{1,2\}",
    "(3,4)": "(3,4)",
    "6 - 5i": "6 - 5i",
    "x_1+x_2": "x_1+x_2",
    r"\log_2 3": r"\log_2 3",
    r"\mathbb{R}": r"\mathbb{R}",
    r"\begin{pmatrix}1\\2\end{pmatrix}": r"\begin{pmatrix}1\\2\end{pmatrix}",
    r"2\sqrt{3}\text{ cm}": r"2\sqrt{3}",
    "2π": r"2\pi",
    "2pi": r"2\pi",
    "2√3": r"2\sqrt{3}",
    "√(x+1)": r"\sqrt{x+1}",
    "x²+1": "x^{2}+1",
    "2^5": "2^5",
}
"""Answer -> what math-verify is given."""

NONE = (
    *("5", "3/4", "50%", r"\frac{3}{4}", "12 km", "", "none", "nan", "N/A", "about 5", "3 or 4", r"3\text{ or }4"),
    *("x = 2 and y = 3", "3:30", "2024-01-05", "1.2.3", "3-4", "3-4 km", "1/0", "10^99999", "x", "(B)", "B.", "U.S."),
    *(r"\text{(B)}", r"\text{even}", "H2O", "C++", "1,2,3", "1.234,56", "2 x 3", "12 x 3", "?", "1st", "0x1F", "x+é"),
    "x+" * 2000 + "x",
)
"""Answers that are numbers, or no mathematics."""

STAND_IN = """
import os, time

class LatexExtractionConfig:
    pass

def parse(text, configs=(), *, fallback_mode, parsing_timeout):
    assert fallback_mode == "no_fallback" and parsing_timeout is None
    if "hang" in text or r"\\int" in text:
        time.sleep(60)
    if r"\\oint" in text:
        os._exit(3)
    if "raise" in text:
        raise RecursionError
    return [] if r"\\foo" in text else [text.strip("$").replace(" ", "")]

def verify(right, found, *, timeout_seconds):
    assert timeout_seconds is None
    return sorted(right[0]) == sorted(found[0])
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A small math_verify: expressions of the same characters are equal."""
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "math_verify.py"


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr("rlhf_dist.config.reward_words.find_spec", lambda name: None)


@pytest.fixture
def reader():
    made = AnswerReader()
    yield made
    made.close()


@pytest.fixture
def number():
    made = NumberReward("math", RewardSpec(kind="number", timeout_s=1.0))
    yield made
    made.close()


@pytest.mark.parametrize(("answer", "latex"), EXPRESSIONS.items())
def test_an_expression_is_told_from_what_is_none(answer, latex):
    assert expression(answer) == latex


@pytest.mark.parametrize("answer", NONE)
def test_numbers_words_dates_and_choices_are_no_expressions(answer):
    assert expression(answer) is None


@pytest.mark.parametrize(
    ("response", "part"),
    [
        ("x + 1", "$x + 1$"),
        ("2√3", r"$2\sqrt{3}$"),
        ("so #### x+1", "$x+1$"),
        ("#### $x+1$ it is", "$x+1$ it is"),
        (r"3 or \boxed{x+1}, yes", "$x+1$"),
        ("we get $x+1$", "we get $x+1$"),
    ],
)
def test_the_part_of_a_response_that_counts(response, part):
    assert given(response) == part


def test_without_math_verify_the_reason_names_it_for_expressions_alone(absent, reader, number):
    assert "expressions need math-verify: pip install math-verify" in (reader.unreadable("number", "2x+1") or "")
    for answer in ("none", "3:30", "x"):
        assert reader.unreadable("number", answer) == unreadable_answer("number", answer)
    assert number(["so 4", "5"], ["4", "4"]).tolist() == [1, 0]
    with pytest.raises(RewardError, match=r"the reward math cannot compare .*'2x\+1'.*which is not installed on this"):
        number(["2x+1"], ["2x+1"])


def test_with_math_verify_expressions_are_read_and_nothing_else(stand_in, reader):
    for answer in ("2x+1", "5", "[1, 2)"):
        assert reader.unreadable("number", answer) is None
    assert reader.unreadable("number", r"\foo{x}") == "math-verify does not read it as an expression"
    for answer in ("none", "3:30", "3-4", "x"):
        assert reader.unreadable("number", answer) == unreadable_answer("number", answer)
    assert reader.unreadable("exact", "2x+1") is None


def test_expressions_are_compared_by_math_verify_and_numbers_never(stand_in, number):
    responses = ["1+x", "#### x + 1", r"\boxed{x+2}", "raise", "", "4", "hang 4", r"\foo"]
    answers = ["x+1", "x+1", "x+1", "x+1", "x+1", "4", "4", "x+1"]
    assert number(responses, answers).tolist() == [1, 1, 0, 0, 0, 1, 1, 0]


def test_a_comparison_that_hangs_or_dies_is_given_up_by_name(stand_in):
    number = NumberReward("math", RewardSpec(kind="number", timeout_s=0.2))
    with pytest.raises(RewardError) as late:
        number(["we hang"], ["x+1"])
    for words in ("the reward math: math-verify did not finish within 0.2 s", "'x+1'", "'we hang'", "math.timeout_s"):
        assert words in str(late.value)
    with pytest.raises(RewardError, match=r"ended its process \(exit code 3\) for the answer 'x\+1'"):
        number([r"\oint"], ["x+1"])
    assert number(["1+x"], ["x+1"]).tolist() == [1]  # in another process
    number.close()


def test_the_check_before_the_start_is_bounded(stand_in, reader, monkeypatch):
    monkeypatch.setattr(verifier, "READ_LIMIT_S", 0.1)
    late = [reader.unreadable("number", rf"\int x + {n}") or "" for n in range(verifier.MOST_LATE)]
    assert all("did not read it within 0.1 s" in reason for reason in late)
    assert "it was not read" in (reader.unreadable("number", "x+1") or "")
    assert reader.unreadable("number", "4") is None


def test_a_math_verify_that_cannot_be_imported_is_told(stand_in, reader):
    stand_in.write_text("import no_such_antlr")
    with pytest.raises(ConfigError, match=r"math-verify cannot be used: .*no_such_antlr"):
        reader.unreadable("number", "x+1")


def test_the_first_lines_say_whether_it_is_in_use(stand_in, monkeypatch):
    config = Config(scoring=ScoringConfig(rewards={"math": RewardSpec(kind="number")}))
    assert reward_lines(config)[0] == "rewards: math (number with math-verify, weight 1)"
    monkeypatch.setattr("rlhf_dist.config.reward_words.find_spec", lambda name: None)
    assert reward_lines(config)[0] == "rewards: math (number, weight 1)"


@pytest.mark.skipif(find_spec("math_verify") is None, reason="math-verify is not installed")
def test_the_real_math_verify_compares_values():
    number = NumberReward("math", RewardSpec(kind="number", timeout_s=60.0))
    cases = [
        (r"\frac{\sqrt{3}}{2}", r"so \boxed{\frac{\sqrt3}2}", 1),
        (r"\frac{\sqrt{3}}{2}", "√3/2", 1),
        (r"\frac{\sqrt{3}}{2}", "0.8660254", 1),
        (r"\frac{\sqrt{3}}{2}", "0.866", 0),
        ("x+1", "we get $1+x$", 1),
        ("x+1", "x+2", 0),
        ("[1,2)", "[1, 2)", 1),
        ("[1,2)", "(1, 2)", 0),
        (r"\{1,2\}", r"\boxed{\{2,1\}}", 1),
        (r"2\sqrt{3}", r"#### \sqrt{12}", 1),
        ("x+1", "{" * 3000, 0),
    ]
    answers, responses, right = zip(*cases, strict=True)
    assert number(responses, answers).tolist() == list(right)
    number.close()
