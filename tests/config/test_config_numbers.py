"""The rules of `numbers`: where a key has an effect, and what a roll back needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.schema import (
    AlgoConfig,
    Config,
    KLConfig,
    LearnerConfig,
    LoopConfig,
    NumbersConfig,
    ReferenceConfig,
    RolloutConfig,
)


def found(numbers: NumbersConfig, **sections: Any) -> list[str]:
    return problems(replace(Config(), numbers=numbers, **sections), "train")


ROLL_BACK = NumbersConfig(on_fault="roll_back")


@pytest.mark.parametrize(
    ("numbers", "sections", "told"),
    [
        (ROLL_BACK, {}, ""),
        (ROLL_BACK, {"loop": LoopConfig(checkpoint_every=0)}, "nothing is saved before the end of the run"),
        (ROLL_BACK, {"loop": LoopConfig(checkpoint_every=0), "learner": LearnerConfig(keep_state_every=1)}, ""),
        (ROLL_BACK, {"reference": ReferenceConfig(update_every=5)}, "a reference that moves cannot go back"),
        (
            ROLL_BACK,
            {"algo": AlgoConfig(name="nlpo")},
            "with algo.name nlpo, whose learner cannot go back inside a run",
        ),
        (NumbersConfig(on_fault="skip"), {"algo": AlgoConfig(name="nlpo")}, ""),
        (NumbersConfig(max_faults=5), {}, "numbers.max_faults is 5 and has no effect with numbers.on_fault stop"),
        (NumbersConfig(on_fault="skip", max_faults=5), {}, ""),
        (NumbersConfig(on_fault="skip", max_faults=0), {}, "numbers.max_faults is 0; it must be at least 1"),
        (
            NumbersConfig(max_kl=3.0),
            {"algo": AlgoConfig(kl=KLConfig(coef=0.0))},
            "numbers.max_kl is 3.0 but no reference",
        ),
        (NumbersConfig(max_kl=3.0), {"algo": AlgoConfig(kl=KLConfig(coef=0.1))}, ""),
        (NumbersConfig(max_logprob_diff=0.1), {"rollout": RolloutConfig(top_p=0.9)}, "logprobs do not compare"),
        (NumbersConfig(max_logprob_diff=0.1), {}, ""),
    ],
)
def test_what_is_refused(numbers: NumbersConfig, sections: dict[str, Any], told: str) -> None:
    texts = [text for text in found(numbers, **sections) if "numbers." in text]
    assert len(texts) == bool(told) and all(told in text for text in texts)


@pytest.mark.parametrize("command", ["sft", "reward", "eval"])
def test_other_commands_do_without_it(command: Any) -> None:
    config = replace(Config(), numbers=replace(ROLL_BACK, max_kl=1.0), loop=LoopConfig(checkpoint_every=0))
    assert not [text for text in problems(config, command) if "numbers." in text]
