"""A reward model that may mean nothing is named when a run uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config

from rlhf_dist.cluster import sources
from rlhf_dist.config.schema import AlgoConfig, Config, CriticConfig, RewardSpec, ScoringConfig


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (None, []),
        ({"score_mean": 0.0, "score_std": 1.0, "accuracy": 0.7, "accuracy_low": 0.6, "accuracy_high": 0.8}, []),
        (
            {"score_mean": 0.0, "score_std": 0.001, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6},
            ["is not above chance, 0.5; its rewards may mean nothing", "hardly differ"],
        ),
    ],
)
def test_what_is_stored_with_a_reward_model_is_read_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any, words: list[str]
) -> None:
    made: Any = Qwen2Config(architectures=["Qwen2ForSequenceClassification"])
    made.rlhf_dist = stored
    made.save_pretrained(tmp_path)
    monkeypatch.setattr(sources, "model_path", lambda config, path, key: path)
    rewards = {"exact": RewardSpec(), "judge": RewardSpec(kind="model", path=str(tmp_path))}
    found = sources.reward_model_doubts(Config(scoring=ScoringConfig(rewards=rewards)), begins=True)
    assert len(found) == len(words)
    for told, word in zip(found, words, strict=True):
        assert told.startswith(f"scoring.rewards.judge.path = {tmp_path}: its held-out ") and word in told


@pytest.mark.parametrize(
    ("method", "start", "begins", "told"),
    [
        ("ppo", "judge", True, True),
        ("ppo", "judge", False, False),
        ("ppo", "policy", True, False),
        ("grpo", "judge", True, False),
    ],
)
def test_a_doubtful_model_that_the_critic_starts_from_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, start: str, begins: bool, told: bool
) -> None:
    made: Any = Qwen2Config(architectures=["Qwen2ForSequenceClassification"])
    made.rlhf_dist = {"score_mean": 0.0, "score_std": 1.0, "correlation": 0.1, "correlation_low": -0.1}
    made.save_pretrained(tmp_path / "judge")
    monkeypatch.setattr(sources, "model_path", lambda config, path, key: tmp_path / path)
    config = Config(algo=AlgoConfig(name=method), critic=CriticConfig(start=start))
    found = sources.reward_model_doubts(config, begins)
    assert len(found) == told
    for text in found:
        assert text.startswith("critic.start = judge: its held-out correlation with the ratings, 0.100")
        assert "is not above 0; the critic's first values may mean nothing" in text
