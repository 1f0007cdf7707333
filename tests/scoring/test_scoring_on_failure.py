"""`scoring.on_failure: mask`: a reward that fails is asked for each response by itself, and costs the bad ones only."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_groups import group_of
from test_scoring_http_client import says, serving
from test_scoring_http_server import post, served

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import RewardError
from rlhf_dist.scoring.non_finite import told
from rlhf_dist.scoring.one_by_one import one_by_one
from rlhf_dist.scoring.scorer import Scorer
from rlhf_dist.scoring.texts import Texts, texts_of
from rlhf_dist.scoring.time_limits import Limit, Turn
from rlhf_dist.types import Group, Message, NonFinite, Prompt, Scores

NAN = math.nan
MODULE = """
import os, time

def judge(prompts, responses, answers):
    for response in responses:
        if response == "raise":
            raise ValueError("no number in it")
        if response == "hang":
            time.sleep(600)
        if response == "exit":
            os._exit(3)
        if response == "nonsense":
            return ["much"] * len(responses)
    return [float("nan") if response == "odd" else float(len(response)) for response in responses]
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_failing.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield


def rollout(*texts: str) -> Group:
    n = len(texts)
    prompt = Prompt("0/3", (Message("user", "hi"),), "a", "test")
    return group_of([0, 0], [0] * n, [1] * n, prompt=prompt, texts=texts)


def scored(group: Group, spec: RewardSpec, **changes: Any) -> Scores:
    rewards = {"brief": spec, "letters": RewardSpec(kind="regex", pattern="[a-z]+")}
    with closing(Scorer(ScoringConfig(rewards, **{"on_failure": "mask", **changes}))) as scorer:
        return scorer.score(group)


def judge(timeout_s: float = 30.0) -> RewardSpec:
    return RewardSpec(kind="function", function="my_failing:judge", weight=2.0, timeout_s=timeout_s)


@pytest.mark.parametrize("policy", ["fail", "mask", "zero"])
@pytest.mark.parametrize(
    ("bad", "why", "timeout_s"),
    [
        ("raise", r"raised ValueError: no number in it at .*my_failing\.py:7", 30.0),
        (
            "hang",
            r"did not return within 0\.5 s for 1 responses; make it faster or raise scoring\.rewards\.brief\.",
            0.5,
        ),
        ("exit", r"ended its process \(exit code 3\) in a call for 1 responses", 30.0),
        ("nonsense", r"returned 'much', not a number \(str\), for response 0", 30.0),
    ],
)
def test_a_bad_response_costs_itself_only(bad: str, why: str, timeout_s: float, policy: str) -> None:
    scores = scored(rollout("a", bad, "ccc", "dd"), judge(timeout_s), non_finite=policy)
    np.testing.assert_array_equal(scores.components["brief"], [1.0, NAN, 3.0, 2.0])
    np.testing.assert_array_equal(scores.components["letters"], [1.0] * 4)
    np.testing.assert_array_equal(scores.total, [3.0, NAN, 7.0, 5.0])
    (found,) = scores.non_finite
    assert (found.uid, found.sample, found.rewards, found.response) == ("0/3", 1, {}, f"'{bad}'")
    assert list(found.failed) == ["brief"] and scores.asked_again == 4
    assert re.match(rf"the reward brief \(my_failing:judge\) {why}", found.failed["brief"])


def test_fail_ends_the_run_at_the_first() -> None:
    with pytest.raises(RewardError, match="raised ValueError: no number in it"):
        scored(rollout("a", "raise"), judge(), on_failure="fail", non_finite="mask")


def test_what_does_not_fail_is_asked_for_once() -> None:
    scores = scored(rollout("a", "bb"), judge())
    assert (scores.asked_again, scores.non_finite) == (0, ())


def test_a_value_that_came_follows_its_own_policy_beside_one_that_failed() -> None:
    group = rollout("odd", "raise", "ccc")
    zero = scored(group, judge(), non_finite="zero")
    np.testing.assert_array_equal(zero.components["brief"], [0.0, NAN, 3.0])
    np.testing.assert_array_equal(zero.total, [1.0, NAN, 7.0])
    assert [(list(bad.rewards), list(bad.failed)) for bad in zero.non_finite] == [(["brief"], []), ([], ["brief"])]
    with pytest.raises(RewardError, match="returned nan, not finite in float32, for response 0 of prompt 0/3: 'odd'"):
        scored(group, judge(), non_finite="fail")


def test_a_pattern_that_backtracks_without_end_costs_one_response() -> None:
    spec = RewardSpec(kind="regex", pattern="(a+)+b", timeout_s=0.5)
    scores = scored(rollout("ab", "a" * 40, "b"), spec)
    np.testing.assert_array_equal(scores.components["brief"], [1.0, NAN, 0.0])
    assert "did not finish within 0.5 s, at the response 'aaa" in scores.non_finite[0].failed["brief"]


def test_a_server_that_refuses_one_response_and_one_that_is_gone() -> None:
    broken = says({"detail": "too long"}, 500)
    with serving(broken, says({"scores": [1]}), broken, says({"scores": [3]})) as (url, seen):
        scores = scored(rollout("a", "b", "c"), RewardSpec(kind="http", url=url, retries=0))
        assert [body["responses"] for body in seen.bodies] == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    np.testing.assert_array_equal(scores.components["brief"], [1.0, NAN, 3.0])
    assert "answered 500: too long" in scores.non_finite[0].failed["brief"]
    gone = scored(rollout("a", "b"), RewardSpec(kind="http", url=url, retries=0))
    assert len(gone.non_finite) == 2 and "cannot be reached" in gone.non_finite[1].failed["brief"]


def test_a_hang_is_not_waited_for_beyond_the_group_s_limit() -> None:
    begun = time.monotonic()
    scores = scored(rollout("hang", "bb", "hang"), judge(), timeout_s=1.0)
    assert time.monotonic() - begun < 20.0, "the function's own limit is 30 s"
    assert np.isnan(scores.components["brief"]).all() and scores.asked_again == 0
    why = scores.non_finite[1].failed["brief"]
    assert "did not return within 0.9 s for 3 responses" in why
    assert why.endswith("; scoring.timeout_s was over before response 1 could be asked for by itself")


def texts(*responses: str) -> Texts:
    return texts_of(rollout(*responses))


def test_what_is_not_reached_in_time_has_failed() -> None:
    limit = Limit.of_group(60.0)

    def reward(given: Texts, until: Limit) -> np.ndarray:
        if len(given.responses) > 1:
            raise RewardError("no")
        if given.responses == ("b",):
            until.deadline = time.monotonic()
        return np.ones(1, np.float32)

    given = one_by_one(reward, texts("a", "b", "c", "d"), limit, None, "it")
    np.testing.assert_array_equal(given.values, [1.0, 1.0, NAN, NAN])
    assert list(given.failed) == [2, 3] and given.again == 2


def test_no_group_gets_between_the_responses_of_another(tmp_path: Path) -> None:
    """Else groups would hold each other up for longer than a server may take for its first answer."""
    written, both = tmp_path / "order", threading.Barrier(2)
    (tmp_path / "my_order.py").write_text(
        f"def order(p, r, a):\n    open({str(written)!r}, 'a').write(r[0])\n    raise ValueError\n"
    )
    rewards = {"order": RewardSpec(kind="function", function="my_order:order")}
    with closing(Scorer(ScoringConfig(rewards, on_failure="mask"))) as scorer, ThreadPoolExecutor(2) as pool:

        def score(name: str) -> int:
            both.wait(10)
            return scorer.score(rollout(*[name] * 20)).asked_again

        assert list(pool.map(score, "ab", timeout=60)) == [20, 20]
    assert written.read_text() in ("a" * 21 + "b" * 21, "b" * 21 + "a" * 21)


def test_a_group_that_never_gets_its_turn_has_failed() -> None:
    turn = Turn()
    with turn.take(None, "it"):
        given = one_by_one(lambda *_: np.ones(2, np.float32), texts("a", "b"), Limit.of_group(0.1), turn, "it")
    assert list(given.failed) == [0, 1] and "it was busy with another group for 0.09 s" in given.failed[0]


def test_a_model_that_fails_ends_the_run() -> None:
    class Judge:
        def score(self, group: Group) -> np.ndarray:
            raise RewardError("the reward model brief is broken")

        def score_texts(self, texts: Texts) -> np.ndarray: ...

        def close(self) -> None: ...

    config = ScoringConfig({"brief": RewardSpec(kind="model", path="x"), "f": judge()}, on_failure="mask")
    with closing(Scorer(config, lambda name, spec: Judge())) as scorer, pytest.raises(RewardError, match="is broken"):
        scorer.score(rollout("a"))


def test_the_sentences_for_people() -> None:
    found = [
        NonFinite("0/1", 2, {"far": NAN}, "'x'"),
        NonFinite("0/4", 0, {}, "'y'", {"brief": "the reward brief raised KeyError"}),
        NonFinite("0/4", 1, {}, "'z'", {"brief": "late"}),
    ]
    failed = (
        "2 responses have no reward, which failed (brief 2), and are left out (scoring.on_failure: mask); "
        "the first: the reward brief raised KeyError, for response 0 of prompt 0/4: 'y'"
    )
    assert told(found[1:], "zero") == failed
    assert told(found, "zero") == (
        f"{failed}; 1 response has a reward that is not finite (far 1) and counts as 0 there (scoring.non_finite: "
        "zero); the first: far is nan for response 2 of prompt 0/1: 'x'"
    )


def test_a_reward_server_answers_null_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    config = ScoringConfig({"brief": judge()}, on_failure="mask", non_finite="zero")
    with closing(Scorer(config)) as scorer, served(scorer) as address:
        status, answer = post(address, {"prompts": ["p"] * 2, "responses": ["a", "raise"]})
    assert (status, answer["scores"], answer["components"]) == (200, [2.0, None], {"brief": [1.0, None]})
    assert "1 response has no reward, which failed (brief 1), and is left out" in capsys.readouterr().err
