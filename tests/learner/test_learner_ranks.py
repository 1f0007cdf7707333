"""Real DeepSpeed in one and in two processes: the cut of a batch changes nothing, a checkpoint goes on exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rank_processes import distance, run_ranks
from ranks import METHODS

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.tiny import make_tiny

pytestmark = pytest.mark.timeout(600)
STAGES = (0, 1, 2, 3)
# Its largest matrices have more than 100,000 elements: ZeRO-3 leaves smaller ones whole on every rank.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=2, heads=2, kv_heads=1, max_positions=128)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `ranks.py` found; one process alone and two together, side by side."""
    folder = tmp_path_factory.mktemp("ranks")
    model = make_tiny(MODEL, folder)
    return run_ranks("ranks.py", folder, model, folder)


@pytest.mark.parametrize("step", ["one", "two", "three"])
@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_with_4_micro_batches_is_two_ranks_with_2(results: dict, stage: int, step: str) -> None:
    one, two = results[1, 0][stage], results[2, 0][stage]
    assert distance(two[step], one[step], one["start"]) <= 1e-6
    assert distance(results[2, 1][stage][step], two[step], one["start"]) == 0, "both ranks hold the same weights"
    assert two["norm"] == pytest.approx(one["norm"], rel=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_is_plain_adamw(results: dict, stage: int) -> None:
    """Of the same loss in one micro-batch, with weight decay and clipping; the norm is that before clipping."""
    expected = results[1, 0]["plain"]
    assert expected["norm"] > 0.1, "more than twice the limit"
    for world in (1, 2):
        found = results[world, 0][stage]
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-6)
        for step in ("one", "two", "three"):
            assert distance(found[step], expected[step], found["start"]) <= 1e-6


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_published_weights_have_moved_and_are_the_trained_ones(results: dict, stage: int, world: int) -> None:
    found = results[world, 0][stage]
    assert found["published"].keys() == found["start"].keys()
    for name, tensor in found["published"].items():
        assert torch.equal(tensor, found["two"][name]), name
        assert not torch.equal(tensor, found["start"][name]), f"{name} did not move"
    assert all("published" not in results[2, 1][s] for s in STAGES), "only rank 0 writes"


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_part_of_a_method_is_the_same_on_one_rank_and_two(results: dict, method: str, stage: int) -> None:
    """Ratios of sequences, corrections, masks by entropy and distance: three steps on uneven rows."""
    one, two = results[1, 0][method][stage], results[2, 0][method][stage]
    assert distance(two["three"], one["three"], one["start"]) <= 1e-5
    for alone, together in zip(one["metrics"], two["metrics"], strict=True):
        assert together["learner/grad_norm"] == pytest.approx(alone["learner/grad_norm"], rel=1e-4)


def test_the_bounds_of_those_methods_were_met(results: dict) -> None:
    """Else the test above would compare nothing."""

    def largest(method: str, name: str) -> float:
        return max(values[name] for values in results[1, 0][method][2]["metrics"])

    gspo, _, dr_grpo, rloo = METHODS
    assert 0 < largest(gspo, "policy/clipped_low") + largest(gspo, "policy/clipped_high") < 1
    assert largest(gspo, "correction/weight") < 1
    assert 0 < largest(dr_grpo, "correction/masked") < 1
    assert 0 < largest(dr_grpo, "policy/off_policy_masked") < 1
    assert largest(rloo, "correction/masked") > 0 and largest(rloo, "learner/grad_norm") > 0


def test_zero_3_really_holds_parts(results: dict) -> None:
    assert [results[2, 0][stage]["partitioned"] > 0 for stage in STAGES] == [False, False, False, True]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_a_restored_checkpoint_goes_on_exactly(results: dict, stage: int, world: int) -> None:
    for rank in range(world):
        found = results[world, rank][stage]
        for name, tensor in found["three"].items():
            assert torch.equal(found["three_restored"][name], tensor), name
        # Adam's moments are a part of it: without them the third step is another one.
        assert distance(found["three_without_restore"], found["three"], found["two"]) > 1e-2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_trains_with_float32_masters(results: dict, stage: int) -> None:
    found = results[2, 0]["bfloat16"][stage]
    assert not isinstance(found, str), found
    assert all(abs(loss) < 10 for loss in found["losses"])
    assert set(found["optimizer"].values()) == {"torch.float32"}
    assert {tensor.dtype for tensor in found["two"].values()} == {torch.bfloat16}
    # Tensor by tensor it goes where the float32 run goes, as far as 8 bits can tell.
    exact = results[2, 0][stage]
    moved = torch.cat([(found["two"][name].float() - found["start"][name].float()).flatten() for name in exact["two"]])
    right = torch.cat([(exact["two"][name] - exact["start"][name]).flatten() for name in exact["two"]])
    assert float(torch.cosine_similarity(moved, right, dim=0)) > 0.7


def test_bfloat16_without_zero_is_refused_by_deepspeed(results: dict) -> None:
    """Which is why the config's checks refuse it first."""
    assert "NotImplementedError" in results[2, 0]["bfloat16"][0]
