"""Critics on real DeepSpeed in one and in two processes: apart and on the policy's trunk. The cut changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import ForkServer
from rank_processes import distance, run_ranks
from safetensors.torch import load_file, save_file

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.scalar import load_scalar, save_scalar
from rlhf_dist.models.tiny import make_tiny

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
STAGES = (0, 2, 3)
KINDS = ("critic", "shared")
# Its largest matrices have more than 100,000 elements: ZeRO-3 leaves smaller ones whole on every rank.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=1, heads=2, kv_heads=1, max_positions=128)


def make_models(folder: Path) -> None:
    """A critic and a shared trunk whose heads are not zero, so that the first step moves every weight."""
    model = make_tiny(MODEL, folder)
    torch.manual_seed(1)
    scalar = load_scalar(model, "float32", "eager")
    torch.nn.init.normal_(scalar.get_submodule("score").weight, std=0.05)
    save_scalar(scalar, model, folder / "critic", None)
    shutil.copytree(model, folder / "shared" / "hf")
    head = {"weight": torch.randn(1, MODEL.hidden_size) * 0.05, "bias": torch.tensor([0.3])}
    save_file(head, folder / "shared" / "value_head.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("critics")
    make_models(found)
    return found


@pytest.fixture(scope="module")
def results(folder: Path, forks: ForkServer) -> dict[tuple[int, int], dict[str, Any]]:
    """(world size, rank) -> what `critic_ranks.py` found; one process alone and two together, side by side."""
    return run_ranks(forks, "critic_ranks.py", folder, folder)


@pytest.mark.parametrize("step", ["one", "two"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_with_4_micro_batches_is_two_ranks_with_2_is_plain_adamw(
    results: dict, kind: str, stage: int, step: str
) -> None:
    """Two passes of two mini-batches a step, with clipped values, weight decay and gradient clipping."""
    one, two = results[1, 0][kind][stage], results[2, 0][kind][stage]
    expected = results[1, 0]["plain"][kind][step]
    assert distance(two[step], one[step], one["start"]) <= 2e-6
    assert distance(results[2, 1][kind][stage][step], two[step], one["start"]) == 0, "both ranks hold the same weights"
    for found in (one, two):
        assert distance(found[step], expected, one["start"]) <= 2e-6


@pytest.mark.parametrize("key", [(1, 0), (2, 0), (2, 1)])
def test_a_shared_trunk_learns_under_a_mask_as_plain_torch_does(results: dict, key: tuple[int, int]) -> None:
    """Text that is mixed in is not masked. Alone without ZeRO, two ranks under ZeRO 3."""
    expected, found = results[1, 0]["plain"]["masked"]["one"], results[key]["masked"]
    assert distance(found["one"], expected, found["start"]) <= 1e-5
    assert distance(results[1, 0]["plain"]["shared"]["one"], expected, found["start"]) > 0.05, "the mask is to be seen"


def test_the_ranks_needed_a_different_number_of_chunks(results: dict) -> None:
    """Of the logprobs of one pass. Under ZeRO-3 they wait for each other in every call of the language-model head."""
    ranks = [results[2, rank] for rank in range(2)]
    for found in ([rank["shared"][3] for rank in ranks], [rank["masked"] for rank in ranks]):
        first, second = (part["first"]["chunks"] for part in found)
        assert len(first) == len(second) and any(a != b for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_moved_and_the_bounds_were_met(results: dict, kind: str) -> None:
    """Otherwise the comparison above would say little."""
    found = results[1, 0][kind][0]
    assert all(not torch.equal(found["one"][name], tensor) for name, tensor in found["start"].items())
    metrics = found["first"]["metrics"].values()
    assert 0.1 < metrics["critic/value_clipped"] < 1 and metrics["critic/loss"] > 0
    if kind == "shared":
        assert metrics["policy/clipped_low"] > 0.01 and metrics["policy/clipped_high"] > 0.01
        assert metrics["learner/updates"] == 4 and metrics["kl/loss"] > 0 and metrics["policy/entropy"] > 1
        assert metrics["learner/grad_norm"] > 0.5 and metrics["ptx/loss"] > 1
        assert metrics["data/dropped_ptx"] > 0


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_metrics_of_two_ranks_are_those_of_one(results: dict, kind: str, stage: int) -> None:
    one = results[1, 0][kind][stage]["first"]["metrics"].values()
    merge = type(results[1, 0][kind][stage]["first"]["metrics"]).merge
    two = merge([results[2, rank][kind][stage]["first"]["metrics"] for rank in range(2)]).values()
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_do_not_know_how_the_batch_was_cut(results: dict, kind: str, stage: int) -> None:
    one = results[1, 0][kind][stage]["first"]
    two = [results[2, rank][kind][stage]["first"] for rank in range(2)]
    together = two[0]["estimate"] | two[1]["estimate"]
    assert len(two[0]["estimate"]) + len(two[1]["estimate"]) == len(together) == 12, "each row on one rank"
    assert together.keys() == one["estimate"].keys()
    for row, table in one["estimate"].items():
        torch.testing.assert_close(together[row], table, atol=1e-5, rtol=1e-5)
    assert two[0]["sums"] == two[1]["sums"]
    assert two[0]["sums"].metrics() == pytest.approx(one["sums"].metrics(), rel=1e-5)
    assert abs(one["estimate"][0, 0][2]).min() > 1e-3, "values are not all 0"


def test_the_critics_credit_is_gae_of_scores_less_kl(results: dict) -> None:
    """Row by row, with rewards written out in `flat_estimate`."""
    expected = results[1, 0]["plain"]["critic"]["estimate_one"]
    found = results[1, 0]["critic"][0]["first"]["estimate"]
    table = torch.cat([found[g, s] for g in range(4) for s in range(3)], dim=1).numpy()
    for row, name in zip(table, ("advantages", "returns", "values"), strict=True):
        np.testing.assert_allclose(row, getattr(expected, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_checkpoint_goes_on_bit_for_bit(results: dict, kind: str, stage: int, world: int) -> None:
    """The value head on a shared trunk is part of it."""
    for rank in range(world):
        found = results[world, rank][kind][stage]
        assert found["one_restored"].keys() == found["one"].keys()
        for step in ("one", "two"):
            for name, tensor in found[step].items():
                assert torch.equal(found[f"{step}_restored"][name], tensor), (step, name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_shared_trunk_publishes_and_saves_the_language_model_and_the_head_beside_it(
    results: dict, folder: Path, stage: int
) -> None:
    names = set(load_file(folder / "shared" / "hf" / "model.safetensors"))
    for world in (1, 2):
        found = results[world, 0]["shared"][stage]
        assert set(found["published"]) == names
        assert set(found["one"]) == {f"model.{name}" for name in names} | {"value_head.weight", "value_head.bias"}
        checkpoint = folder / f"SharedTrainer-{world}-{stage}"
        assert set(load_file(checkpoint / "hf" / "model.safetensors")) == names
        for name, tensor in load_file(checkpoint / "value_head.safetensors").items():
            assert torch.equal(tensor, found["one"][f"value_head.{name}"])
    assert results[2, 1]["shared"][stage]["published"] is None


@pytest.mark.parametrize("stage", STAGES)
def test_a_new_run_from_a_policy_of_another_run_has_a_new_value_head(results: dict, folder: Path, stage: int) -> None:
    """That run's head lies beside its policy; it values the returns of that run."""
    for key, found in results.items():
        head = found["shared"][stage]["of_another_run"]
        assert head.keys() == {"value_head.weight", "value_head.bias"}
        assert all(not tensor.any() for tensor in head.values())
        beside = load_file(folder / f"SharedTrainer-{key[0]}-{stage}" / "value_head.safetensors")
        assert all(tensor.any() for tensor in beside.values())


def test_zero_3_really_holds_parts(results: dict) -> None:
    for kind in KINDS:
        assert [results[2, 0][kind][stage]["partitioned"] > 0 for stage in STAGES] == [False, False, True]


def test_a_kl_limit_ends_all_ranks_at_the_same_update(results: dict) -> None:
    """Though one of two, asked alone, would have gone on."""
    found = [results[key]["stop"] for key in ((1, 0), (2, 0), (2, 1))]
    assert [stop["all"] for stop in found] == [6.0] * 3
    assert len({stop["expected"] for stop in found}) == 1 and 2 < found[0]["expected"] < 6
    assert [stop["made"] for stop in found] == [found[0]["expected"]] * 3
    assert sorted(found[1]["alone"]) == [False, True]
