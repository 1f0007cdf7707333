"""Reward model training on real DeepSpeed: the cut of a batch changes nothing, it is plain torch, it can be resumed."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from forks import ForkServer
from preference_ranks import COMPARISONS, QUESTION, RATINGS, comparison
from rank_processes import distance, run_ranks
from transformers import AutoModelForSequenceClassification

from rlhf_dist.config.schema import RewardConfig, TinyConfig
from rlhf_dist.data.judgement_rows import Comparison, Pair
from rlhf_dist.errors import DataError
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.preference_learner import (
    Element,
    HeldOutScores,
    PreferenceLearner,
    better_rows,
    judgement_loss,
    pairs_of,
    tokenize_judgement,
)
from rlhf_dist.models.hf import load_tokenizer
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.models.tokenizer import character_tokenizer

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
CASES = [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0), (0, 0.3), (3, 0.3)]
"""ZeRO stage, weight of the language-model loss."""
# Its largest matrices have more than 100,000 elements: ZeRO-3 leaves smaller ones whole on every rank.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=2, heads=2, kv_heads=1, max_positions=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preference")


@pytest.fixture(scope="module")
def results(folder: Path, forks: ForkServer) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `preference_ranks.py` found; one process alone and two together, side by side."""
    model = make_tiny(MODEL, folder)
    return run_ranks(forks, "preference_ranks.py", folder, model, folder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_however_a_batch_is_cut_it_is_plain_torch(results: dict, case: tuple[int, float], world: int) -> None:
    """Of losses written out, in one micro-batch; 4 micro-batches on one rank, 2 on each of two."""
    expected = results[1, 0]["plain", case[1]]
    for rank in range(world):
        found = results[world, rank][case]
        for step in ("one", "two", "three"):
            assert distance(found[step], expected[step], found["start"]) <= 1e-5, step
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)


def test_the_ranks_needed_a_different_number_of_chunks(results: dict) -> None:
    """Of the logprobs of one pass. Under ZeRO-3 they wait for each other in every call of the language-model head."""
    first, second = (results[2, rank][3, 0.3]["chunks"] for rank in range(2))
    assert len(first) == len(second) and any(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2])
def test_a_restored_checkpoint_goes_on_as_if_never_cut(results: dict, case: tuple[int, float], world: int) -> None:
    for rank in range(world):
        found = results[world, rank][case]
        assert distance(found["three_restored"], found["three"], found["two"]) <= 1e-5
        # Adam's moments are a part of it: without them the third step is another one.
        assert distance(found["three_without_restore"], found["three"], found["two"]) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_saves_although_its_own_checkpoint_is_gone(results: dict, folder: Path, case: Any) -> None:
    saved = folder / f"second-checkpoint-2-{case[0]}-{case[1]}" / "hf"
    model: Any = AutoModelForSequenceClassification.from_pretrained(saved)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, results[2, 0][case]["three_restored"][name]), name
    assert len(load_tokenizer(saved)) == len(character_tokenizer())


def test_the_first_step_starts_at_log_2_with_every_choice_open(results: dict) -> None:
    """The new head is zero: all scores are equal, apart from the margin of one comparison of six."""
    parts = [results[2, rank][0, 0.0]["metrics"] for rank in (0, 1)]
    values = parts[0].merge(parts).values()
    assert values["reward_model/loss"] == pytest.approx((5 * math.log(2) + math.log1p(math.exp(0.7))) / 6)
    assert values["reward_model/train_accuracy"] == 0.5
    assert "reward_model/lm_loss" not in values
    with_lm = parts[0].merge(results[2, rank][3, 0.3]["metrics"] for rank in (0, 1)).values()
    assert with_lm["reward_model/lm_loss"] > 1, "nats per character of a random model"


@pytest.mark.parametrize("case", CASES)
def test_the_shares_of_the_ranks_are_the_whole(results: dict, case: tuple[int, float]) -> None:
    one = results[1, 0][case]["held_out"]
    two = HeldOutScores.merge(results[2, rank][case]["held_out"] for rank in (0, 1))
    assert one.judgements == two.judgements == 6 and len(one.better) == len(two.better) == 4 + 6 + 3
    assert two.loss == pytest.approx(one.loss, rel=1e-4)
    leads = [np.sort(held.scores[held.better] - held.scores[held.worse]) for held in (one, two)]
    np.testing.assert_allclose(leads[0], leads[1], atol=1e-4)


def test_the_saved_model_scores_as_the_trained_one_in_transformers(results: dict, folder: Path) -> None:
    held_out = results[1, 0][3, 0.3]["held_out"]
    saved = folder / "checkpoint-1-3-0.3" / "hf"
    plain: Any = AutoModelForSequenceClassification.from_pretrained(saved)
    assert plain.config.rlhf_dist == {"score_mean": 0.5, "score_std": 2.0}
    assert not any("lm_head" in name for name, _ in plain.named_parameters())
    assert (saved.parent / "lm_head.safetensors").exists()
    rows = [row for judgement in COMPARISONS for row in tokenize_judgement(load_tokenizer(saved), judgement, True).rows]
    with torch.no_grad():
        scores = [float(plain(torch.from_numpy(row.tokens[None].astype(np.int64))).logits) for row in rows]
    np.testing.assert_allclose(np.sort(held_out.scores), np.sort(scores), atol=1e-4)


@pytest.mark.parametrize("kind", sorted(RATINGS))
def test_ratings_are_learnt(results: dict, kind: str) -> None:
    """Scores of 0 at first: squared error 3/6 of ratings 1 and 0, log 2 of thumbs."""
    for world in (1, 2):
        found = [results[world, rank][kind] for rank in range(world)]
        held_out = HeldOutScores.merge(part["held_out"] for part in found)
        assert held_out.loss / held_out.judgements < (0.5 if kind == "regression" else math.log(2)) - 0.005
        assert sorted(held_out.values) == [0, 0, 0, 1, 1, 1] and held_out.thumbs == (kind == "logistic")
        assert len(held_out.better) == 0
    assert results[1, 0][kind]["losses"][0] == pytest.approx(0.5 if kind == "regression" else math.log(2))


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_learns_too(results: dict, stage: int) -> None:
    found = results[2, 0]["bfloat16", stage]
    exact = results[2, 0][stage, 0.0]
    assert {tensor.dtype for tensor in found["two"].values()} == {torch.bfloat16}
    moved = torch.cat([(found["two"][name].float() - found["start"][name].float()).flatten() for name in exact["two"]])
    right = torch.cat([(exact["two"][name] - exact["start"][name]).flatten() for name in exact["two"]])
    assert float(torch.cosine_similarity(moved, right, dim=0)) > 0.7


def element(*responses: str) -> Element:
    return tokenize_judgement(character_tokenizer(), comparison(1, *responses), True)


def test_a_row_is_prompt_response_and_end_token() -> None:
    tokenizer: Any = character_tokenizer()
    row = element("ab", "c").rows[0]
    assert tokenizer.decode(row.tokens.tolist()) == "<|user|>say it<|end|><|assistant|>ab<|end|>"
    assert row.length == 3


def test_a_ranking_counts_as_much_as_a_pair_and_each_response_is_scored_once() -> None:
    """Pair: log(1 + e^-1). Ranking 2, 0, 1: (softplus(-2) + softplus(-1) + softplus(1)) / 3."""
    batch = [element("a", "b"), element("a", "b", "c")]
    loss, pairs = judgement_loss(torch.tensor([1.0, 0.0, 2.0, 0.0, 1.0]), batch)
    assert pairs.better.tolist() == [0, 2, 2, 3] and pairs.worse.tolist() == [1, 3, 4, 4]
    assert pairs.element.tolist() == [0, 1, 1, 1]
    expected = math.log1p(math.exp(-1)) + sum(math.log1p(math.exp(x)) for x in (-2, -1, 1)) / 3
    assert float(loss) == pytest.approx(expected)


def test_the_better_responses_of_a_comparison_are_worse_than_none() -> None:
    made = Comparison("here", QUESTION, ("a", "b", "c", "d"), (Pair(2, 0, 0.0), Pair(1, 3, 0.0), Pair(0, 3, 0.0)))
    found = better_rows(tokenize_judgement(character_tokenizer(), made, True))
    assert [character_tokenizer().decode(row.tokens[-2:-1].tolist()) for row in found] == ["b", "c"]
    rating = tokenize_judgement(character_tokenizer(), RATINGS["logistic"][0], True)
    assert better_rows(rating) == [] and len(pairs_of([rating], torch.device("cpu")).better) == 0


def learner(held_out: list[Any], max_tokens: int) -> PreferenceLearner:
    engine: Any = SimpleNamespace(share=0)
    return PreferenceLearner(
        engine,
        RewardConfig(),
        held_out,
        held_out,
        character_tokenizer(),
        chat=True,
        max_tokens=max_tokens,
        seed=0,
        shares=1,
        micro_batch_tokens=100,
    )


def test_a_comparison_with_one_side_too_long_is_left_out_whole_and_counted() -> None:
    judgements = [comparison(1, "a", "b"), comparison(2, "a", "b" * 40)]
    made = learner(judgements, 20)
    assert made._held_out_dropped == 1 and [e.judgement.place for e in made._held_out] == ["here:1"]


def test_nothing_that_fits_is_an_error_with_the_key() -> None:
    with pytest.raises(DataError, match=r"none of 1 judgements fits in preferences\.max_tokens 5"):
        learner([comparison(1, "a", "b")], 5)


def test_judgements_come_in_the_files_own_order_without_shuffle() -> None:
    """`data/tokens` tells which judgement a step of one was made of."""
    texts = ["a" * length for length in range(2, 8)]
    judged = [Comparison(text, QUESTION, (text, text + "b"), (Pair(0, 1, 0.0),)) for text in texts]

    class Scores:
        share = 0
        device = torch.device("cpu")

        def scores(self, packed: Packed) -> torch.Tensor:
            return torch.zeros(len(packed.offsets) - 1, requires_grad=True)

        def backward(self, loss: torch.Tensor, last: bool) -> None: ...

        def step(self, lr: float) -> float:
            return 1.0

    def tokens(shuffle: bool) -> list[float]:
        engine: Any = Scores()
        learner = PreferenceLearner(
            engine, RewardConfig(batch_size=1), judged, judged, character_tokenizer(), chat=True, max_tokens=100,
            seed=0, shares=1, micro_batch_tokens=1000, shuffle=shuffle,
        )  # fmt: skip
        return [learner.train_step(step).values()["data/tokens"] for step in range(1, 13)]

    assert tokens(False)[:6] == tokens(False)[6:] == sorted(tokens(False)[:6])
    assert sorted(tokens(True)[:6]) == sorted(tokens(True)[6:]) == tokens(False)[:6] != tokens(True)[:6]
