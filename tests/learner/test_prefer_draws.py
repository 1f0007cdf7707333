"""Which judgements a step learns from, and whose reference values, with a stand-in for the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prefer_ranks import comparison

from rlhf_dist.config.schema import PreferConfig, RewardConfig
from rlhf_dist.data.judgement_rows import Judgement
from rlhf_dist.errors import DataError
from rlhf_dist.learner.checkpoint_files import REFERENCE_VALUES_FILE
from rlhf_dist.learner.prefer_learner import PreferLearner
from rlhf_dist.learner.preference_learner import PreferenceLearner
from rlhf_dist.models.tokenizer import character_tokenizer

LONG = "x" * 100
DATA: list[Judgement] = [
    comparison(1, LONG, "no"),
    comparison(2, "yes", LONG),
    comparison(3, "yes", "no way"),
    comparison(4, "sun", "some rain"),
    comparison(5, "one", "two three"),
]
SHORT: list[Judgement] = DATA[2:]


class Model:
    """Gives each token a logprob, and each row a score, that only its own tokens shape."""

    rank, share, parts, device = 0, 0, 1, torch.device("cpu")

    def logprobs(self, packed: Any, temperature: float) -> torch.Tensor:
        return -(packed.targets % 7 + 1).float()

    def scores(self, packed: Any) -> torch.Tensor:
        return torch.arange(len(packed.offsets) - 1).float()

    def of_all_ranks(self, value: Any) -> list[Any]:
        return [value]

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        assert torch.isfinite(loss)

    def step(self, rate: float) -> float:
        return 0.0


def keys(steps: int) -> dict[str, Any]:
    return {"steps": steps, "batch_size": 2}


def common() -> dict[str, Any]:
    return {"chat": True, "max_tokens": 60, "seed": 0, "shares": 1, "micro_batch_tokens": 200, "shuffle": False}


def prefer(train: list[Judgement], method: str = "dpo", new: bool = True, steps: int = 3) -> PreferLearner:
    """`new`: it reads its reference; else that is to be restored."""
    engine: Any = Model()
    config = PreferConfig(method=method, **keys(steps))  # pyright: ignore[reportArgumentType]
    reference = (lambda packed: -(packed.targets % 5 + 1).float()) if new else None
    learner = PreferLearner(engine, config, train, SHORT, character_tokenizer(), reference=reference, **common())
    while new and learner.read_reference():
        pass
    return learner


def reward(train: list[Judgement]) -> PreferenceLearner:
    engine: Any = Model()
    return PreferenceLearner(engine, RewardConfig(**keys(3)), train, SHORT, character_tokenizer(), **common())


def dropped(learner: Any) -> list[float]:
    return [learner.train_step(step).values()["data/dropped_judgements"] for step in (1, 2, 3)]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_step_whose_judgements_are_all_too_long_learns_from_the_next_ones(method: str) -> None:
    """Batches of two: both too long, two that fit, one that fits and one (of the next epoch) that does not."""
    assert dropped(prefer(DATA, method)) == [2, 0, 1]
    assert dropped(reward(DATA)) == [2, 0, 1]
    first, second = (prefer(data, method).train_step(1).values() for data in (DATA, SHORT))
    if method == "dpo":
        assert first["prefer/loss"] == second["prefer/loss"]


def test_the_reference_reads_what_a_step_takes_instead(tmp_path: Path) -> None:
    """Of a run of one step, which is of the first two judgements; also after a resume."""
    learner = prefer(DATA, steps=1)
    expected = learner.train_step(1).values()
    learner.save_reference(tmp_path)
    again = prefer(DATA, new=False, steps=1)
    again.restore_reference(tmp_path)
    assert again.train_step(1).values() == expected


def test_where_none_fits_the_run_ends_and_says_so() -> None:
    for learner in (prefer(DATA[:2]), reward(DATA[:2])):
        with pytest.raises(DataError, match=r"none of \d+ judgements fits in preferences\.max_tokens 60"):
            learner.train_step(1)


@pytest.mark.parametrize(
    "now",
    [
        [DATA[3], DATA[2], *DATA[4:]],
        [DATA[2], DATA[3], comparison(5, "one", "two four")],
        [DATA[2], DATA[3]],
        [*SHORT, DATA[2]],
    ],
    ids=["reordered", "edited", "fewer", "more"],
)
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_of_other_judgements_is_refused(now: list[Judgement], method: str, tmp_path: Path) -> None:
    prefer(SHORT, method).save_reference(tmp_path)
    moved = [replace(each, place="elsewhere:1") for each in SHORT]
    prefer(moved, method, new=False).restore_reference(tmp_path)
    with pytest.raises(DataError, match=rf"{REFERENCE_VALUES_FILE}: has .* other judgements .* from here:\d on: "):
        prefer(now, method, new=False).restore_reference(tmp_path)


def test_of_kto_the_response_to_another_prompt_counts_too(tmp_path: Path) -> None:
    """Of a run of one step on two judgements: the third is only put behind the prompt of the second."""
    prefer(SHORT, "kto", steps=1).save_reference(tmp_path)
    with pytest.raises(DataError, match="other judgements"):
        changed = [*SHORT[:2], comparison(5, "three", "two three")]
        prefer(changed, "kto", new=False, steps=1).restore_reference(tmp_path)
