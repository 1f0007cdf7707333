"""Keys of the way that weights take from the learner to the rollout workers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.schema import ClusterConfig, Config, LearnerConfig, ModelConfig


def delta(dtype: str = "bfloat16", stage: int = 1, colocate: bool = False) -> Config:
    return replace(
        Config(),
        model=ModelConfig(dtype=dtype),  # pyright: ignore[reportArgumentType]
        learner=LearnerConfig(delta_push=True, zero_stage=stage),
        cluster=ClusterConfig(colocate=colocate),
    )


@pytest.mark.parametrize("config", [delta(), delta(stage=3), delta(colocate=True)])
def test_changed_words_are_pushed_where_that_saves_something(config: Config) -> None:
    assert problems(config, "train") == []


def test_and_refused_where_steps_change_nearly_every_word() -> None:
    assert problems(delta(dtype="float32"), "train") == [
        "learner.delta_push is true and has no effect with model.dtype float32, whose steps change nearly every "
        "weight; take it out, or set model.dtype to bfloat16"
    ]
