"""Answers of data rows, responses of models and what reward servers say: a value, a reason, or one error."""

from __future__ import annotations

import json
import math

import httpx
import pytest
from fuzzing import mutated, search
from hypothesis import strategies as st

from rlhf_dist.config.schema import RewardSpec
from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.answers import answer_numeral, final_numeral, unreadable_answer
from rlhf_dist.scoring.http_client import HttpReward
from rlhf_dist.scoring.texts import Texts
from rlhf_dist.types import Message

PIECES = st.sampled_from(
    [
        *(
            "#### ",
            r"\boxed{",
            "}",
            "{",
            "$",
            ",",
            ".",
            "-",
            "−",
            "/",
            "%",
            "3",
            "1,234",
            "٣",
            "½",
            "²",
            "e9",
            "1" * 400,
        ),
        *(r"\frac{1}{2}", "=", " or ", "km", "\u2028", "\x00", "\ud800", "\n", "^", "_", r"\text{", "(", ")", ":", "π"),
    ]
)
NUMBERS = st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join)


@pytest.mark.parametrize("examples", [400, pytest.param(4000, marks=pytest.mark.faults)])
def test_any_text_is_read_as_an_answer_or_there_is_a_reason(examples: int) -> None:
    def check(text: str) -> None:
        reason = unreadable_answer("number", text)
        numeral = answer_numeral(text)
        assert reason is None or isinstance(reason, str)
        assert (numeral is None) == (reason is not None)
        if numeral is not None:
            found = final_numeral(text)
            assert found is not None and found.value == numeral.value  # a response that repeats the answer is right
        final_numeral(text)
        unreadable_answer("exact", text)

    examples_of = ["#### 42", r"so \boxed{3/4} is it", "1,234.5 km", "$-50%$", r"\frac{1}{2}"]
    search(examples, check, NUMBERS | mutated(examples_of))


@pytest.mark.parametrize("examples", [150, pytest.param(1500, marks=pytest.mark.faults)])
def test_whatever_a_reward_server_says_is_scores_or_one_error(examples: int) -> None:
    texts = Texts(("p", "q"), ("r", "s"), ("", ""), ((Message("user", "p"),), (Message("user", "q"),)), (True, True))
    spec = RewardSpec(kind="http", url="http://127.0.0.1:9/score", retries=0, timeout_s=5.0)

    reward = HttpReward("judge", spec, 10.0)

    def check(given: tuple[int, bytes, dict[str, str]]) -> None:
        status, body, headers = given
        reward._calls._client = httpx.Client(
            transport=httpx.MockTransport(lambda request: httpx.Response(status, content=body, headers=headers))
        )
        try:
            scores = reward(texts)
        except RewardError as error:
            assert "judge" in str(error) and len(str(error)) < 1000 and "\n" not in str(error)
        else:
            told = json.loads(body)["scores"]
            assert scores.shape == (2,)
            for got, was in zip(scores, told, strict=True):
                assert (
                    (math.isnan(got) and (was is None or math.isnan(was)))
                    or math.isclose(got, was, rel_tol=1e-6, abs_tol=1e-44)
                    or math.isinf(got)
                )
        finally:
            reward.close()

    numbers = st.none() | st.floats() | st.integers(-(10**400), 10**400) | st.text(max_size=3) | st.booleans()
    scores = (
        st.lists(numbers, min_size=1, max_size=3) | numbers | st.dictionaries(st.text(max_size=2), numbers, max_size=2)
    )
    bodies = scores.map(lambda value: json.dumps({"scores": value}).encode()) | st.binary(max_size=30)
    mangled = mutated(['{"scores": [1, 2]}', '{"detail": "no"}']).map(
        lambda text: text.encode("utf-8", "surrogatepass")
    )
    headers = st.sampled_from(
        [{}, {"content-type": "text/html; x"}, {"location": "http://[::1"}, {"content-encoding": "gzip"}]
    )
    status = st.sampled_from([200, 201, 204, 301, 302, 400, 401, 403, 404, 422, 429, 500, 503])
    search(examples, check, st.tuples(st.just(200) | status, bodies | mangled, headers))
