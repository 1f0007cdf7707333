"""Training on preferences on real DeepSpeed: a batch may be cut in any way, it is plain torch, a resume is exact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import ForkServer
from prefer_ranks import CASES
from rank_processes import distance, run_ranks

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.errors import DataError
from rlhf_dist.learner.checkpoint_files import REFERENCE_VALUES_FILE
from rlhf_dist.learner.reference_values import ReferenceValues
from rlhf_dist.models.tensors import read_tensors, write_tensors
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.telemetry.metrics import MetricSums

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
# Its largest matrices have more than 100,000 elements: ZeRO-3 leaves smaller ones whole on every rank.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=2, heads=2, kv_heads=1, max_positions=128)
WITH_REFERENCE = [case for case in CASES if case[1] in ("dpo", "ipo", "kto")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefer")


@pytest.fixture(scope="module")
def results(folder: Path, forks: ForkServer) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `prefer_ranks.py` found; one process alone and two together, side by side."""
    model, other = (make_tiny(TinyConfig(**vars(MODEL) | {"seed": seed}), folder) for seed in (0, 1))
    return run_ranks(forks, "prefer_ranks.py", folder, model, other, folder)


def merged(results: dict, world: int, case: tuple[int, str], what: str) -> dict[str, float]:
    return MetricSums.merge([results[world, rank][case][what] for rank in range(world)]).values()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", [1, 2])
def test_however_a_batch_is_cut_it_is_plain_torch(results: dict, case: tuple[int, str], world: int) -> None:
    """Of losses written out, row by row; 4 micro-batches on one rank, 2 on each of two."""
    expected = results[1, 0]["plain", case]
    for rank in range(world):
        found = results[world, rank][case]
        for step in ("one", "two", "three"):
            assert distance(found[step], expected[step], found["start"]) <= 2e-5, step
    metrics = merged(results, world, case, "metrics")
    assert metrics["learner/grad_norm"] == pytest.approx(expected["one_norm"], rel=1e-4)
    assert metrics["prefer/loss"] == pytest.approx(expected["one_loss"], rel=1e-5)
    assert merged(results, world, case, "after")["prefer/held_out_loss"] == pytest.approx(
        expected["after_loss"], rel=1e-4
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("world", [1, 2])
def test_a_resume_is_the_same_bit_for_bit(results: dict, case: tuple[int, str], world: int) -> None:
    """From weights that have moved, so that the reference can only be that of the checkpoint."""
    for rank in range(world):
        found = results[world, rank][case]
        for name, tensor in found["three"].items():
            assert torch.equal(tensor, found["three_restored"][name]), name
        assert found["after"] == found["after_restored"]
        assert distance(found["three"], found["two"], found["start"]) > 1e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_methods_with_a_reference_keep_one(results: dict, folder: Path, case: tuple[int, str]) -> None:
    assert results
    path = folder / f"checkpoint-2-{case[0]}-{case[1]}" / REFERENCE_VALUES_FILE
    assert path.exists() == (case in WITH_REFERENCE)


@pytest.mark.parametrize("case", WITH_REFERENCE, ids=str)
def test_the_reference_is_read_whole_on_every_rank(results: dict, folder: Path, case: tuple[int, str]) -> None:
    """The ranks share the rows; the file has all, as one rank alone finds them: training and held-out ones."""
    assert results
    one, two = (read_tensors(folder / f"checkpoint-{w}-{case[0]}-{case[1]}" / REFERENCE_VALUES_FILE) for w in (1, 2))
    rows = [2, 4, 2, 2, 2] if case[1] != "kto" else [3, 5, 3, 3, 3, 2, 2]
    assert one["rows"].tolist() == two["rows"].tolist() == [*rows, *rows]
    torch.testing.assert_close(one["logprobs"], two["logprobs"], rtol=1e-5, atol=1e-4)
    half = len(one["logprobs"]) // 2
    torch.testing.assert_close(one["logprobs"][:half], one["logprobs"][half:], rtol=1e-5, atol=1e-4)


def test_dpo_starts_at_log_2_where_the_reference_is_the_start(results: dict) -> None:
    before = merged(results, 2, (0, "dpo"), "before")
    assert before["prefer/held_out_loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert before["prefer/margin"] == pytest.approx(0.0, abs=1e-4)
    after = merged(results, 2, (0, "dpo"), "after")
    assert after["prefer/held_out_loss"] < math.log(2.0) - 0.05 and after["prefer/accuracy"] > 0.8
    assert after["prefer/chosen_reward"] - after["prefer/rejected_reward"] == pytest.approx(after["prefer/margin"])
    other = merged(results, 2, (3, "dpo"), "before")
    assert abs(other["prefer/held_out_loss"] - math.log(2.0)) > 1e-3, "another model is the reference"


def test_kto_tells_its_reference_point_and_the_others_none(results: dict) -> None:
    assert merged(results, 2, (3, "kto"), "metrics")["prefer/reference_point"] == pytest.approx(0.0, abs=1e-4)
    assert "prefer/reference_point" not in merged(results, 2, (0, "dpo"), "metrics")
    assert merged(results, 2, (0, "orpo"), "metrics")["prefer/chosen_nll"] > 1, "nats per character, of a random model"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    values = ReferenceValues()
    values.keep({(False, 3): [-1.5, -2.0], (True, 0): [-4.0]})
    values.save(tmp_path, b"digest")
    again = ReferenceValues()
    assert again.restore(tmp_path) == b"digest"
    assert again.of((False, 3)).tolist() == [-1.5, -2.0] and again.of((True, 0)).dtype == np.float32
    write_tensors({"weight": torch.zeros(2)}, tmp_path / REFERENCE_VALUES_FILE)
    with pytest.raises(DataError, match="does not hold the reference's logprobs"):
        again.restore(tmp_path)
