"""Ranks that share the tokens of each row, on real DeepSpeed over gloo: as one rank that has them all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from forks import ForkServer
from rank_processes import distance, run_ranks
from sequence_ranks import CASES, WITH_FOUR

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.models.scalar import load_scalar, save_scalar
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.telemetry.metrics import MetricSums

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
# Two ranks have a key-value head each, four ranks half of one. ZeRO-3 cuts matrices of more than 100,000 elements.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=2, heads=4, kv_heads=2, max_positions=128)
EXACT = [case for case, (_, _, dtype, _) in CASES.items() if dtype == "float32"]
SHARED = [*((2, case) for case in EXACT), *((4, case) for case in WITH_FOUR)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, forks: ForkServer) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `sequence_ranks.py` found; one process alone and four together."""
    folder = tmp_path_factory.mktemp("sequences")
    model = make_tiny(MODEL, folder)
    torch.manual_seed(1)
    scalar = load_scalar(model, "float32", "eager")
    torch.nn.init.normal_(scalar.get_submodule("score").get_parameter("weight"), std=0.05)
    save_scalar(scalar, model, folder / "critic", None)
    return run_ranks(forks, "sequence_ranks.py", folder, model, folder / "critic", folder, worlds=(1, 4))


@pytest.mark.parametrize(("parts", "case"), SHARED)
def test_ranks_that_share_rows_learn_what_one_rank_does(results: dict, parts: int, case: str) -> None:
    """Two passes over rows of 4 to 63 tokens; the norms among the metrics are those before clipping."""
    one = results[1, 0][1, case]
    for rank in range(4):
        found = results[4, rank][parts, case]
        assert found["offloads"] == ("offloaded" in case) and not one["offloads"]
        assert distance(found["two"], one["two"], one["start"]) <= 1e-5
        torch.testing.assert_close(found["logprobs"], one["logprobs"], rtol=0, atol=1e-4)
    sums = MetricSums.merge([results[4, rank][parts, case]["metrics"] for rank in range(4)])
    tokens = {name: sum(counts) for name, counts in one["metrics"].buckets.items()}
    assert {name: sum(counts) for name, counts in sums.buckets.items()} == tokens, "each token is counted once"
    merged, alone = sums.values(), one["metrics"].values()
    assert merged.keys() == alone.keys()
    for name, value in alone.items():
        assert merged[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("parts", [2, 4])
def test_a_critic_in_turn_learns_what_one_rank_does(results: dict, parts: int) -> None:
    one = results[1, 0][1, "critic"]
    for rank in range(4):
        found = results[4, rank][parts, "critic"]
        assert distance(found["two"], one["two"], one["start"]) <= 1e-5
        assert found["credit"].metrics() == pytest.approx(one["credit"].metrics(), rel=1e-4, abs=1e-5)
    shares = [torch.cat(results[4, rank][parts, "critic"]["scores"]) for rank in range(0, 4, parts)]
    torch.testing.assert_close(
        torch.cat(shares).sort().values, torch.cat(one["scores"]).sort().values, rtol=0, atol=1e-4
    )


def test_bfloat16_goes_where_one_rank_goes(results: dict) -> None:
    """With float32 masters; as far as 8 bits can tell."""
    case = "grpo, zero 3, bfloat16"
    one, found = results[1, 0][1, case], results[4, 0][2, case]
    assert {tensor.dtype for tensor in found["two"].values()} == {torch.bfloat16}
    moved, right = (
        torch.cat([(x["two"][name].float() - x["start"][name].float()).flatten() for name in one["two"]])
        for x in (found, one)
    )
    assert float(torch.cosine_similarity(moved, right, dim=0)) > 0.95
