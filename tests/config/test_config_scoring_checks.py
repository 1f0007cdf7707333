"""Rules of rewards that are models, servers or the gold reward."""

from __future__ import annotations

import re

import pytest

from rlhf_dist.config import checks
from rlhf_dist.config.schema import Config, DataConfig, RewardSpec, ScoringConfig, TaskConfig
from rlhf_dist.config.scoring_checks import scoring_problems

URL = "http://127.0.0.1:8070/score"
DESCRIBE = DataConfig(task=TaskConfig(name="describe"))


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REWARD_TOKEN", "s3cr3t")
    monkeypatch.delenv("TEST_NO_TOKEN", raising=False)
    monkeypatch.setenv("TEST_EMPTY_TOKEN", "")


def problems(data: DataConfig = DESCRIBE, gold: str = "", **spec: object) -> list[str]:
    rewards = {"mine": RewardSpec(**spec)}  # pyright: ignore[reportArgumentType]
    return list(scoring_problems(Config(data=data, scoring=ScoringConfig(rewards=rewards, gold=gold))))


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "model", "path": "runs/rm"},
        {"kind": "model", "path": "runs/rm", "normalize": False},
        {"kind": "http", "url": URL},
        {"kind": "http", "url": "http://localhost:8070", "retries": 0},
        {"kind": "http", "url": "https://[::1]/score", "retries": 20},
        {"kind": "http", "url": "https://judge.example:8070/score", "token_env": "TEST_REWARD_TOKEN"},
        {"kind": "gold", "weight": 0.0},
        {"kind": "exact"},
    ],
)
def test_what_is_right_has_no_problem(spec: dict[str, object]) -> None:
    assert problems(**spec) == problems(gold="mine", **spec) == []


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"kind": "model"}, "mine.path is empty; kind model needs"),
        ({"kind": "model", "path": "tiny"}, "mine.path is 'tiny', a language model"),
        ({"kind": "http"}, "mine.url is ''; kind http needs a whole address"),
        ({"kind": "http", "url": "127.0.0.1:8070"}, "mine.url is '127.0.0.1:8070'; kind http needs"),
        ({"kind": "http", "url": "ftp://127.0.0.1/score"}, "kind http needs a whole address"),
        ({"kind": "http", "url": "http:///score"}, "kind http needs a whole address"),
        ({"kind": "http", "url": "http://127.0.0.1:port/score"}, "kind http needs a whole address"),
        ({"kind": "http", "url": "http://127.0.0.1:99999/score"}, "kind http needs a whole address"),
        ({"kind": "http", "url": "http://[::1/score"}, "kind http needs a whole address"),
        ({"kind": "http", "url": "http://127.0.0.1/a b"}, "kind http needs a whole address"),
        ({"kind": "http", "url": "http://judge.example/score"}, "another machine, without a token"),
        ({"kind": "http", "url": "http://127.0.0.1.example/score"}, "another machine, without a token"),
        ({"kind": "http", "url": URL, "retries": -1}, "mine.retries is -1; it must be between 0 and 20"),
        ({"kind": "http", "url": URL, "retries": 21}, "mine.retries is 21; it must be between 0 and 20"),
        ({"kind": "http", "url": URL, "token_env": "TEST_NO_TOKEN"}, "is TEST_NO_TOKEN, a variable that is not set"),
        ({"kind": "http", "url": URL, "token_env": "TEST_EMPTY_TOKEN"}, "not set or empty"),
        (
            {"kind": "exact", "path": "runs/rm"},
            "mine.path is 'runs/rm' and has no effect with kind exact; set",
        ),
        (
            {"kind": "model", "path": "x", "timeout_s": 5.0},
            "mine.timeout_s is 5.0 and has no effect with kind model; take it out; scoring.timeout_s is its limit",
        ),
        ({"kind": "gold", "timeout_s": 5.0}, "has no effect with kind gold; take it out; it cannot take long"),
        (
            {"kind": "model", "path": "x", "url": URL},
            "mine.url is set and has no effect with kind model; set",
        ),
        ({"kind": "exact", "token_env": "X"}, "mine.token_env is set and has no effect with kind exact"),
        ({"kind": "exact", "normalize": False}, "mine.normalize is False and has no effect with kind exact"),
        (
            {"kind": "gold", "keep_special_tokens": True},
            "mine.keep_special_tokens is True and has no effect with kind gold; set kind to exact or",
        ),
        ({"kind": "exact", "retries": 1}, "mine.retries is 1 and has no effect with kind exact"),
        ({"kind": "gold", "data": DataConfig()}, "mine.kind is gold, .* and the prompts are reverse"),
        ({"kind": "gold", "data": DataConfig(source="jsonl")}, "the prompts are of data.source jsonl"),
        ({"kind": "exact", "gold": "truth"}, "scoring.gold is 'truth'; it must be the name of one of .*: mine"),
    ],
)
def test_what_is_wrong_is_one_sentence_with_the_way_out(spec: dict[str, object], words: str) -> None:
    (problem,) = problems(**spec)  # pyright: ignore[reportArgumentType]
    assert re.search(words, problem), problem


@pytest.mark.parametrize("secret", ["sk-abc123", "hf_AbCdEf", "abc"])
def test_a_token_in_the_config_is_refused_and_not_shown(secret: str) -> None:
    (problem,) = problems(kind="http", url=URL, token_env=secret)
    assert "must be the name of an environment variable" in problem and secret not in problem
    (problem,) = problems(kind="http", url=f"http://user:{secret}@127.0.0.1/score")
    assert "holds a user or a password" in problem and secret not in problem


def test_commands_that_do_not_score_do_not_mind() -> None:
    config = Config(data=DESCRIBE, scoring=ScoringConfig(rewards={"mine": RewardSpec(kind="model")}))
    assert checks.problems(config, "sft") == checks.problems(config, "reward") == []
    assert len(checks.problems(config, "eval")) == 1
