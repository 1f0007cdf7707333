"""The witness on real DeepSpeed: what the optimizer took, sample by sample, and nothing else is changed by asking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import ForkServer
from numbers_checks import refused
from numbers_ranks import FEW
from rank_processes import run_ranks
from witness_ranks import IDLE, METHOD, cases, cut, learner_of

from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.ledger import Presence
from rlhf_dist.loop.witnessed import Witnessed, compare

pytestmark = [pytest.mark.engines, pytest.mark.timeout(300)]
ALL = [(world, case) for world in (1, 2) for case in cases(world)]
UPDATES = 4


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory, forks: ForkServer, tiny_model: Path
) -> dict[tuple[int, int], dict[Any, Any]]:
    """(world size, rank) -> what `witness_ranks.py` found."""
    folder = tmp_path_factory.mktemp("witness")
    return run_ranks(forks, "witness_ranks.py", folder, tiny_model, folder)


def settled(world: int, case: str, seen: list[Seen]) -> Witnessed:
    """As the controller compares it."""
    learner = learner_of(world, case)
    batch, credit, shards = cut(learner)
    return compare(seen, shards, batch, credit, METHOD, learner, UPDATES, cut=False)


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("world", "case"), ALL)
def test_every_sample_is_seen_as_often_as_planned(results: dict, world: int, case: str) -> None:
    """Two passes, in two optimizer steps each of which has several micro-batches; five samples have no advantage."""
    found = [results[world, rank][case][True] for rank in range(world)]
    of_all = [origin for one in found for origin in one["seen"].rows]
    assert len(set(of_all)) == 12 - len(IDLE)
    assert all(one["seen"].times.tolist() == [2.0] * len(one["seen"].rows) for one in found)
    assert settled(world, case, [one["seen"] for one in found]) == Witnessed(
        (Presence(2, 1), Presence(2, 1), Presence(0, 3), Presence(3, 0)), ()
    )


@pytest.mark.parametrize(("world", "case"), ALL)
def test_asking_changes_no_bit_of_what_is_learnt(results: dict, world: int, case: str) -> None:
    for rank in range(world):
        without, asked = results[world, rank][case][False], results[world, rank][case][True]
        assert equal(without["weights"], asked["weights"]) and equal(without["optimizer"], asked["optimizer"])
        assert without["metrics"] == asked["metrics"] and without["seen"] is None


def test_the_batch_has_what_could_go_wrong(results: dict) -> None:
    """Gradients of several micro-batches are accumulated, one rank has none where another has, tokens are clipped."""
    counts = [results[2, rank]["zero 2"][True]["micro-batches"] for rank in (0, 1)]
    assert max(len(update) for rank in counts for update in rank) > 1
    assert 0 in {count for rank in counts for update in rank for count in update}
    values = results[1, 0]["zero 0"][True]["metrics"].values()
    assert values["policy/clipped_low"] + values["policy/clipped_high"] > 0.2


TAMPERED = [(1, "zero 2"), (2, "zero 2"), (2, "zero 2, two ranks a row")]


@pytest.mark.parametrize(("world", "case"), TAMPERED)
@pytest.mark.parametrize(("change", "times"), [("dropped", 0), ("doubled", 4)])
def test_a_sample_that_a_rank_drops_or_trains_twice_is_named(
    results: dict, world: int, case: str, change: str, times: int
) -> None:
    seen = [results[world, rank][case, change] for rank in range(world)]
    batch, _, shards = cut(learner_of(world, case))
    row = int(shards[0].updates[0][0][0])
    uid, sample = batch.uids[shards[0].groups[row]], shards[0].samples[row]
    (problem,) = settled(world, case, seen).problems
    parts = " on part 0 of the ranks that share it" if "a row" in case else ""
    assert problem == (
        f"the optimizer took sample {sample} of group {uid} in {times} optimizer steps{parts}, and the plan says 2"
    )


@pytest.mark.parametrize(("world", "case"), TAMPERED)
def test_another_body_than_the_plans_is_named(results: dict, world: int, case: str) -> None:
    """The plan is right; what lies in its first row is not."""
    _, _, shards = cut(learner_of(world, case))
    problems = settled(world, case, [results[world, rank][case, "exchanged"] for rank in range(world)]).problems
    names = {f"sample {shards[0].samples[row]} of group 0/{shards[0].groups[row]}" for row in (0, -1)}
    assert len(names) == 2 == len(problems)
    assert {problem.split("took ")[1].split(" in ")[0] for problem in problems} == names


def test_an_optimizer_step_or_a_backward_pass_that_did_not_happen_is_seen(results: dict) -> None:
    """Planned are two passes over two optimizer steps. The first pass lacks its second step, which trains group 3, and
    the second pass the first micro-batch of its first."""
    seen: Seen = results[1, 0]["skipped"]
    _, _, (shard,) = cut(learner_of(1, "zero 0"))
    expected = np.full(len(shard.groups), 2.0)
    expected[np.concatenate(shard.updates[1])] = 1.0
    expected[shard.updates[0][0]] = 1.0
    assert len(shard.updates[0]) > 1 and set(shard.groups[np.concatenate(shard.updates[1])]) == {3}
    assert seen.times.tolist() == expected.tolist()
    assert len(settled(1, "zero 0", [seen]).problems) == int((expected == 1).sum())


@pytest.mark.parametrize("case", FEW)
def test_numbers_that_are_not_finite_are_refused_by_all_ranks_and_leave_nothing_behind(
    results: dict, case: str
) -> None:
    """Of two ranks; `test_learner_numbers.py` has all cases."""
    refused([results[2, rank]["numbers"][case] for rank in (0, 1)], shares=2)
