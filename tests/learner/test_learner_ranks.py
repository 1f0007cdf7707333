"""Real DeepSpeed in one and in two processes: the cut of a batch changes nothing, a checkpoint goes on exactly."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import ForkServer
from plain_methods import METHODS, OPTIMIZER, Seen
from rank_processes import Weights, distance, run_ranks
from ranks import LAG, rollouts
from safetensors import safe_open
from safetensors.torch import load_file
from sample_groups import rows_of

from rlhf_dist.config.schema import TinyConfig
from rlhf_dist.learner.micro_batch_rows import pack_rows
from rlhf_dist.models.hf import copy_weights, load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.models.tiny import make_tiny
from rlhf_dist.telemetry.metrics import MetricSums

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
STAGES = (0, 1, 2, 3)
# Its largest matrices have more than 100,000 elements: ZeRO-3 leaves smaller ones whole on every rank.
MODEL = TinyConfig(hidden_size=192, intermediate_size=640, layers=2, heads=2, kv_heads=1, max_positions=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def results(folder: Path, forks: ForkServer) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `ranks.py` found; one process alone and two together, side by side."""
    model = make_tiny(MODEL, folder)
    return run_ranks(forks, "ranks.py", folder, model, folder)


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
    assert found["other buffer"], "the third step's weights lie beside the second's"
    assert all("published" not in results[2, 1][s] for s in STAGES), "only rank 0 writes"
    assert all(results[2, rank][stage]["number alone"] for rank in range(2)), "weights that stand are not written"


@pytest.mark.parametrize(("method", "stage"), [(name, stage) for name in METHODS for stage in METHODS[name].stages])
def test_two_ranks_learn_every_method_as_plain_torch_does(results: dict, method: str, stage: int) -> None:
    """Three steps, whose loss stands in `plain_methods.py` by hand, one response at a time."""
    expected, found = results[1, 0]["methods"][method], results[2, 0]["methods"][stage][method]
    assert distance(found["start"], expected["start"], expected["three"]) == 0
    assert distance(found["three"], expected["three"], expected["start"]) <= 1e-5
    assert distance(results[2, 1]["methods"][stage][method]["three"], found["three"], expected["start"]) == 0
    # Before clipping: after it a gradient of the wrong size can be the right one.
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5, abs=1e-6)


def test_those_batches_were_uneven(results: dict) -> None:
    """Several micro-batches, not as many rows on both ranks, and none at all on one."""
    for method in METHODS:
        first, second = (results[2, rank]["methods"][3][method]["rows"] for rank in range(2))
        assert [len(counts) for counts in first] == [len(counts) for counts in second]
        assert max(len(counts) for counts in first) >= 2
        assert any(sum(a) != sum(b) for a, b in zip(first, second, strict=True))
    # The entropy bonus too: a term of the loss that a rank without rows has to have as well.
    for method in ("reinforce_pp, KL in the reward", "grpo, dual clip, KL and entropy in the loss"):
        first, second = (results[2, rank]["methods"][3][method]["rows"] for rank in range(2))
        assert any(0 in counts for counts in (*first, *second))


@pytest.mark.parametrize("method", METHODS)
def test_the_bounds_of_those_methods_were_met(results: dict, method: str) -> None:
    """Else the comparison would say little; and no token was so near one that rounding decides."""
    seen: Seen = results[1, 0]["methods"][method]["seen"]
    assert seen.counts and all(0.005 < seen.share(name) < 0.5 for name in seen.counts)
    assert seen.closest > 2e-5
    norms = results[1, 0]["methods"][method]["norms"]
    assert max(norms) > OPTIMIZER.max_grad_norm
    smallest = min(norm for norm in norms if norm)
    assert method.startswith("cispo") or METHODS[method].epochs == 1 or 0.05 < smallest < OPTIMIZER.max_grad_norm


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("version", "follows"), [(0, 0), (1, 0), (2, 2)])
def test_every_ranks_mask_follows_every_second_version(
    results: dict, stage: int, version: int, follows: int, tmp_path: Path
) -> None:
    """The logprobs are those of plain torch under the mask that the policy of version `follows` makes."""
    ranks = [results[2, rank]["masked"][stage] for rank in range(2)]
    policies = [PackedPolicy(load_model(make_tiny(MODEL, tmp_path), "float32", "segmented")) for _ in range(2)]
    for policy, number in zip(policies, (version, follows), strict=True):
        copy_weights(policy.model, iter(ranks[0][f"weights {number}"].items()))
    packed = pack_rows(rows_of(rollouts(1)[0]), torch.device("cpu"))
    where = (packed.tokens, packed.cu_seqlens, packed.predict)
    mask = policies[1].action_mask(*where, LAG.top_p)
    with torch.no_grad():
        expected, _ = policies[0](*where, packed.targets, 1.0, 1024, mask=mask)
    for found in ranks:
        torch.testing.assert_close(found[f"masked {version}"], expected, rtol=0, atol=1e-4)
        assert float((found[f"masked {version}"] - found[f"plain {version}"]).min()) > 0.1, "half is masked"
        for name, tensor in found["saved"].items():
            assert torch.equal(tensor, ranks[0]["weights 2"][name]), name
    if version != follows:
        unmoved = policies[0].action_mask(*where, LAG.top_p)
        with torch.no_grad():
            other, _ = policies[0](*where, packed.targets, 1.0, 1024, mask=unmoved)
        assert float((other - expected).abs().max()) > 1e-2, "the lag is to be seen"


@pytest.mark.parametrize("stage", [2, 3])
def test_the_gradient_under_a_mask_is_that_of_plain_torch(results: dict, stage: int) -> None:
    """Two steps, of logprobs among the tokens that are left, under the mask of version 0; by hand."""
    ranks = [results[2, rank]["masked"][stage] for rank in range(2)]
    start, expected = ranks[0]["weights 0"], results[1, 0]["masked"]
    for version in ("weights 1", "weights 2"):
        assert distance(ranks[0][version], expected[version], start) <= 1e-5
        assert distance(ranks[1][version], ranks[0][version], start) == 0
    assert distance(results[2, 0][stage]["one"], expected["weights 1"], start) > 1e-2, "another one than without"
    assert any(a != b for a, b in zip(*(found["chunks"] for found in ranks), strict=True)), "uneven under ZeRO-3"


@pytest.mark.parametrize("stage", [2, 3])
def test_the_sentinel_tells_stale_tokens_from_wrong_ones(results: dict, stage: int) -> None:
    """Over both ranks: the last sample of each group has the learner's version and one token that is 0.01 off."""
    ranks = [results[2, rank]["stale"][stage] for rank in range(2)]
    groups = rollouts(2)
    moved = [group.sampled(found) for group, found in zip(groups, ranks[0]["moved"], strict=True)]
    fresh = sum(len(samples[-1]) for samples in moved)
    older = np.concatenate([found for samples in moved for found in samples[:-1]])
    mixed = MetricSums.merge([found["mixed"] for found in ranks]).values()
    assert mixed["rollout/logprob_diff_max"] == pytest.approx(0.01, abs=1e-4)
    assert mixed["rollout/logprob_diff_mean"] == pytest.approx(0.01 / fresh, abs=1e-5)
    assert mixed["rollout/logprob_diff/lag_1"] == pytest.approx(older.mean(), rel=1e-3)
    assert older.max() > 0.02, "which would have been the maximum"
    stale = MetricSums.merge([found["stale"] for found in ranks]).values()
    assert [name for name in stale if "logprob_diff" in name] == ["rollout/logprob_diff/lag_1"]


def test_rows_longer_than_the_budget_are_learnt_under_zero_3(results: dict) -> None:
    """They take more calls of the head than other ranks' micro-batches, and each call gathers its weights from all."""
    plain = results[1, 0]["plain"]
    for rank in range(2):
        assert distance(results[2, rank]["tight"], plain["one"], results[2, rank][3]["start"]) <= 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_gradient_checkpointing_changes_nothing(results: dict, stage: int) -> None:
    plain = results[1, 0]["plain"]
    for rank in range(2):
        found = results[2, rank]
        assert distance(found["checkpointed"][stage], plain["one"], found[stage]["start"]) <= 1e-6


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


Layout = tuple[int, int]
"""Ranks, and ZeRO stage."""
Pair = tuple[Layout, Layout, str]
"""Of the checkpoint, of what it is restored in, and the dtype."""
PAIRS: list[Pair] = [
    ((2, 3), (1, 0), "float32"),
    ((1, 0), (2, 3), "float32"),
    ((1, 3), (2, 2), "float32"),
    ((2, 2), (2, 0), "float32"),
    ((2, 1), (1, 3), "bfloat16"),
]
LAYOUTS: list[Layout] = [(ranks, stage) for ranks in (1, 2) for stage in STAGES]
ALL_PAIRS: list[Pair] = [(before, after, "float32") for before in LAYOUTS for after in LAYOUTS if before != after] + [
    ((2, before), after, "bfloat16") for before in STAGES[1:] for after in LAYOUTS if after[1] and after != (2, before)
]


def restored(forks: ForkServer, folder: Path, pairs: Sequence[Pair]) -> dict[tuple[int, int], dict[str, Weights]]:
    """(world size, rank) -> the weights after one more step, by `in_layout`."""
    place = folder / f"layouts-{len(pairs)}"
    place.mkdir()
    return run_ranks(forks, "layout_ranks.py", place, folder, place, json.dumps(pairs))


def in_layout(pair: Pair) -> str:
    (ranks, before), (world, stage), dtype = pair
    return f"{'checkpoint' if dtype == 'float32' else dtype}-{ranks}-{before}-in-{world}-{stage}"


def saved_state(checkpoint: Path) -> Weights:
    """The optimizer's files put together: `PARAMETER.KEY` -> all of it, flat."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for file in checkpoint.glob("optimizer-*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            begins = json.loads(opened.metadata()["optimizer"])["parts"]
        for key, tensor in load_file(file).items():
            begin = begins[key.rpartition(".")[0]] if tensor.dim() else 0
            assert torch.equal(parts.setdefault(key, {}).setdefault(begin, tensor), tensor)
    for pieces in parts.values():
        ends = [begin + len(piece) for begin, piece in sorted(pieces.items()) if piece.dim()]
        assert sorted(pieces) == [0, *ends[:-1]], "one after the other, none twice"
    return {key: torch.cat([p.reshape(-1) for _, p in sorted(pieces.items())]) for key, pieces in parts.items()}


def check_layouts(results: dict, found: dict[tuple[int, int], dict[str, Weights]], folder: Path, pair: Pair) -> None:
    """What is saved again is what was saved, by name, and the next step is the same."""
    (ranks, before), (world, _), dtype = pair
    name = in_layout(pair)
    state, again = saved_state(folder / name.partition("-in-")[0]), saved_state(folder / name)
    assert state.keys() == again.keys() and all(torch.equal(again[key], state[key]) for key in state)
    trained = results[ranks, 0][before] if dtype == "float32" else results[ranks, 0][dtype][before]
    assert len(state) == 4 * len(trained["two"])
    for key, weights in trained["two"].items():
        assert torch.equal(state[f"model.{key}.weights"].to(weights.dtype), weights.reshape(-1)), key
        assert float(state[f"model.{key}.exp_avg"].abs().max()) > 0 and float(state[f"model.{key}.step"]) == 2
    for rank in range(world):
        if dtype == "float32":
            assert distance(found[world, rank][name], trained["three"], trained["start"]) <= 1e-6
        assert distance(found[world, rank][name], found[world, 0][name], trained["start"]) == 0


@pytest.fixture(scope="module")
def some(results: dict, forks: ForkServer, folder: Path) -> dict[tuple[int, int], dict[str, Weights]]:
    return restored(forks, folder, PAIRS)


@pytest.mark.parametrize("pair", PAIRS, ids=in_layout)
def test_another_layout_goes_on_with_the_same_state(results: dict, some: dict, folder: Path, pair: Pair) -> None:
    check_layouts(results, some, folder, pair)


@pytest.mark.faults
def test_every_layout_goes_on_from_every_other(results: dict, forks: ForkServer, folder: Path) -> None:
    found = restored(forks, folder, ALL_PAIRS)
    for pair in ALL_PAIRS:
        check_layouts(results, found, folder, pair)


FOREIGN = r"DataError: .*checkpoint-2-\d: the float32 weights in optimizer-1\.safetensors \(1 of [\d,]+ differ\)"
UNLIKE = r"RunError: .*: the ranks that resumed do not have the same %s \(hashes: rank 0: \w{8}; rank 1: \w{8}\)"


@pytest.mark.parametrize(
    ("altered", "stage", "message"),
    [
        *(("weights", stage, FOREIGN) for stage in STAGES),
        *(("step", stage, UNLIKE % "optimizer steps") for stage in STAGES),
        # Whoever has the only copy cannot be compared: from ZeRO 1 on that of a moment, under ZeRO 3 that of a weight.
        ("exp_avg", 0, UNLIKE % "optimizer state"),
        *(("exp_avg", stage, "") for stage in STAGES[1:]),
        ("memory", 0, FOREIGN),
        *(("memory", stage, UNLIKE % "weights") for stage in (1, 2)),
        *(("length", stage, r"DataError: .*optimizer-1\.safetensors: cannot be read: ") for stage in STAGES),
    ],
)
def test_a_resume_is_refused_where_rank_1_has_something_else(
    results: dict, altered: str, stage: int, message: str
) -> None:
    """With the same sentence on both ranks, the way out in it; what was not altered is restored, see below."""
    found = results[2, 0][stage]["altered"][altered]
    assert results[2, 1][stage]["altered"][altered] == found
    if message:
        assert re.match(message, found) and found.endswith("resume from another checkpoint with --resume-from step-N")
    else:
        assert found == ""


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_is_restored_where_its_masters_round_to_the_weights(results: dict, stage: int) -> None:
    for rank in range(2):
        found = results[2, rank]["bfloat16"][stage]
        assert found["restored"] and "optimizer-1.safetensors (1 of" in found["altered"]


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
