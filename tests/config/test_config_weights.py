"""Keys of the way that weights take from the learner to the rollout workers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.schema import (
    AlgoConfig,
    ClusterConfig,
    Config,
    LearnerConfig,
    LoopConfig,
    ModelConfig,
    ReferenceConfig,
    RolloutConfig,
    WeightsConfig,
)


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


@pytest.mark.parametrize("transport", ["broadcast", "ipc"])
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"learner": LearnerConfig(delta_push=True, zero_stage=1)}, "with learner.delta_push true, which saves bytes"),
        ({"reference": ReferenceConfig(update_every=2)}, "with reference.update_every 2; a reference that moves reads"),
        ({"algo": AlgoConfig(name="nlpo")}, "with algo.name nlpo, whose mask policy reads the shared memory"),
        (
            {"rollout": RolloutConfig(kv_after_push="keep"), "loop": LoopConfig(max_policy_lag=1)},
            "with rollout.kv_after_push keep, which prepares a load from the shared memory",
        ),
        ({"learner": LearnerConfig(timeout_s=60.0)}, "and weights.timeout_s 120.0 with learner.timeout_s 60.0; ranks"),
    ],
)
def test_what_reads_the_shared_memory_is_refused_with_weights_that_are_sent(
    transport: Any, changes: dict[str, Any], problem: str
) -> None:
    base = replace(delta(), learner=LearnerConfig(zero_stage=1), weights=WeightsConfig(transport=transport))
    found = [text for text in problems(replace(base, **changes), "train") if text.startswith("weights.transport")]
    assert [text.startswith(f"weights.transport is {transport} {problem}") for text in found] == [True] * bool(problem)
    shared = replace(base, weights=WeightsConfig())
    assert not [text for text in problems(replace(shared, **changes), "train") if "weights.transport" in text]
