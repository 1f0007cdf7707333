"""Rewards that are NaN or infinite, from every source: what `scoring.non_finite` makes of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from judges import make_texts
from sample_groups import group_of
from test_scoring_http_client import says, serving
from test_scoring_http_server import client, post, served

from rlhf_dist.config.schema import RewardSpec, ScoringConfig
from rlhf_dist.errors import RewardError
from rlhf_dist.scoring import scorer as scorers
from rlhf_dist.scoring.non_finite import told
from rlhf_dist.scoring.scorer import Scorer
from rlhf_dist.types import Group, Message, NonFinite, Prompt

NAN, INF = math.nan, math.inf
GIVEN = [1.0, NAN, -INF, 0.5]
LETTERS = RewardSpec(kind="regex", pattern="[a-z]+")


class Judge:
    """A reward model that gives `GIVEN`."""

    def score(self, group: Group) -> np.ndarray:
        return np.array(GIVEN, np.float32)

    def score_texts(self, texts: Any) -> np.ndarray:
        return np.array(GIVEN, np.float32)

    def close(self) -> None: ...


def rollout() -> Group:
    texts = ("a", "b", "c" * 200, "d")
    prompt = Prompt("0/3", (Message("user", "hi"),), "a", "test")
    return group_of([0, 0], [0] * 4, [1] * 4, prompt=prompt, texts=texts)


Open = Callable[..., Any]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """A scorer whose reward `odd`, of the kind asked for, gives `GIVEN` for `rollout()`."""
    given = "[1.0, float('nan'), -1e300, 0.5]"  # the third is beyond float32
    (tmp_path / "my_odd.py").write_text(f"def odd(p, r, a):\n    return {given}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(scorers, "gold", lambda prompts, responses: np.array(GIVEN, np.float32))
    with serving(says('{"scores": [1, null, -1e999, 0.5]}')) as (url, _):
        specs = {
            "function": RewardSpec(kind="function", function="my_odd:odd", weight=2.0),
            "http": RewardSpec(kind="http", url=url, weight=2.0),
            "model": RewardSpec(kind="model", path="judge", weight=2.0),
            "gold": RewardSpec(kind="gold", weight=2.0),
        }

        @contextmanager
        def make(kind: str, policy: Any, weight: float = 2.0) -> Iterator[Scorer]:
            odd = RewardSpec(**{**vars(specs[kind]), "weight": weight})
            config = ScoringConfig({"odd": odd, "letters": LETTERS}, non_finite=policy)
            with closing(Scorer(config, lambda name, spec: Judge())) as scorer:
                yield scorer

        yield make
    sys.modules.pop("my_odd", None)


KINDS = ("function", "http", "model", "gold")


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        ("function", r"the reward odd \(my_odd:odd\)"),
        ("http", r"the reward server odd \(http://127.*/score\)"),
        ("model", r"the reward model odd \(judge\)"),
        ("gold", "the reward odd"),
    ],
)
def test_fail_names_reward_value_response_prompt_and_the_way_out(opened: Open, kind: str, who: str) -> None:
    place = "for response 1 of prompt 0/3: 'b'; mend it, or set scoring.non_finite to mask or zero; "
    place += "a run that has begun goes on with --resume"
    with (
        opened(kind, "fail") as scorer,
        pytest.raises(RewardError, match=rf"^{who} returned nan, not finite in float32, {place}$"),
    ):
        scorer.score(rollout())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("policy", "odd", "total"),
    [("zero", [1.0, 0.0, 0.0, 0.5], [3.0, 1.0, 1.0, 2.0]), ("mask", GIVEN, [3.0, NAN, NAN, 2.0])],
)
def test_zero_counts_as_0_before_the_weight_and_mask_gives_no_total(
    opened: Open, kind: str, policy: str, odd: list[float], total: list[float]
) -> None:
    with opened(kind, policy) as scorer:
        scores = scorer.score(rollout())
    np.testing.assert_array_equal(scores.components["odd"], odd)
    np.testing.assert_array_equal(scores.components["letters"], [1.0] * 4)
    np.testing.assert_array_equal(scores.total, total)
    assert scores.total.dtype == np.float32
    first, second = scores.non_finite
    assert (first.uid, first.sample, list(first.rewards), first.response) == ("0/3", 1, ["odd"], "'b'")
    assert math.isnan(first.rewards["odd"])
    assert (second.sample, second.rewards) == (2, {"odd": -INF}) and len(second.response) == 80


def test_a_reward_that_only_measures_is_asked_of_too(opened: Open) -> None:
    """0 x NaN is NaN: a response without its gold reward could not be shown."""
    with opened("function", "mask", weight=0.0) as scorer:
        np.testing.assert_array_equal(scorer.score(rollout()).total, [1.0, NAN, NAN, 1.0])
    with opened("function", "zero", weight=0.0) as scorer:
        assert scorer.score(rollout()).total.tolist() == [1.0] * 4


def test_finite_scores_are_left_alone() -> None:
    for policy in ("fail", "mask", "zero"):
        scores = Scorer(ScoringConfig({"letters": LETTERS}, non_finite=policy)).score(rollout())
        assert scores.total.tolist() == [1.0] * 4 and scores.non_finite == ()


def test_the_sentence_for_several_and_for_one() -> None:
    found = [
        NonFinite("0/1", 2, {"odd": INF, "far": NAN}, "'x'"),
        NonFinite("0/4", 0, {"odd": NAN}, "'y'"),
    ]
    assert told(found, "zero") == (
        "2 responses have rewards that are not finite (odd 2, far 1) and count as 0 there (scoring.non_finite: zero); "
        "the first: odd is inf for response 2 of prompt 0/1: 'x'"
    )
    assert told(found[1:], "mask") == (
        "1 response has a reward that is not finite (odd 1) and is left out (scoring.non_finite: mask); "
        "the first: odd is nan for response 0 of prompt 0/4: 'y'"
    )


def test_a_server_that_masks_answers_null_and_says_so(opened: Open, capsys: pytest.CaptureFixture[str]) -> None:
    """The client reads null as NaN, so that the run's own policy decides."""
    texts = make_texts(["a", "b", "c", "d"])
    with opened("function", "mask") as scorer, served(scorer) as address:
        status, answer = post(address, {"prompts": ["p"] * 4, "responses": list(texts.responses)})
        with closing(client(address)) as reward:
            values = reward(texts)
    assert (status, answer["scores"]) == (200, [3.0, None, None, 2.0])
    assert answer["components"] == {"odd": [1.0, None, None, 0.5], "letters": [1.0] * 4}
    np.testing.assert_array_equal(values, [3.0, NAN, NAN, 2.0])
    assert "2 responses have rewards that are not finite (odd 2) and are left out" in capsys.readouterr().err
