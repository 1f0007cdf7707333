"""Placement over the nodes of a cluster: pure arithmetic, and what is said where they are too few."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.placement import NODE, Command, Machine, Placement, bundles, place
from rlhf_dist.planning.plan_lines import describe


def config(
    workers: int = 1, ranks: int = 1, rollout: int = 0, learner: int = 0, parallel: int = 1, **cluster: Any
) -> Config:
    base = Config()
    return dataclasses.replace(
        base,
        rollout=dataclasses.replace(base.rollout, workers=workers, cpus=rollout, tensor_parallel=parallel),
        learner=dataclasses.replace(base.learner, ranks=ranks, cpus=learner),
        cluster=dataclasses.replace(base.cluster, **({"colocate": False} | cluster)),
    )


def with_models(wanted: Config, share: float = 1.0, moves: int = 0) -> Config:
    """With a reference, which a scoring server holds."""
    kl = dataclasses.replace(wanted.algo.kl, coef=0.05)
    return dataclasses.replace(
        wanted,
        algo=dataclasses.replace(wanted.algo, kl=kl),
        reference=dataclasses.replace(wanted.reference, update_every=moves),
        cluster=dataclasses.replace(wanted.cluster, server_gpu_share=share),
    )


def homes(placement: Placement) -> tuple[str, ...]:
    return placement.worker_nodes + placement.rank_nodes


def nodes(*sizes: tuple[int, int]) -> list[Machine]:
    return [Machine(cpus, gpus, f"10.0.0.{i}") for i, (cpus, gpus) in enumerate(sizes, 1)]


def test_what_fits_on_one_node_is_on_one() -> None:
    """The largest; Ray's reservation keeps it together."""
    wanted = config(workers=2, ranks=1)
    assert place_in(wanted, nodes((4, 0), (8, 0)), "train") == place(wanted, Machine(8, 0), "train")
    assert place_in(config(workers=6, ranks=6, device="cpu"), nodes((64, 0), (8, 4)), "train").rank_nodes == ()
    both = config(workers=8, ranks=8, colocate=True)
    assert place_in(both, nodes((4, 0), (8, 0)), "train") == place(both, Machine(8, 0), "train")


def test_rollout_workers_go_where_there_is_room_and_the_learner_stays_with_the_command() -> None:
    wanted = config(workers=3, ranks=2, rollout=2, learner=2)
    found = place_in(wanted, nodes((6, 0), (2, 0), (3, 0)), "train")
    assert homes(found) == ("10.0.0.3", "10.0.0.1", "10.0.0.2", "10.0.0.1", "10.0.0.1")
    assert (found.learner_node, found.rollout_threads, found.learner_threads) == ("10.0.0.1", 2, 2)
    assert bundles(found)[0] == {"CPU": 2.0, "GPU": 0.0, "node:10.0.0.3": 0.001}
    told = describe(found, wanted, "train")
    assert "nodes: rollout workers 1 on 10.0.0.3, 1 on 10.0.0.1, 1 on 10.0.0.2; learner ranks 2 on 10.0.0.1" in told
    assert found.spread_of_ranks() == 1


def test_threads_without_a_number_share_what_their_node_has() -> None:
    """Four workers, none of which fits beside the two ranks of two threads: two on each of the others."""
    found = place_in(config(workers=4, ranks=2, learner=2), nodes((4, 0), (6, 0), (7, 0)), "train")
    assert Counter(homes(found)) == {"10.0.0.1": 2, "10.0.0.2": 2, "10.0.0.3": 2}
    assert (found.rollout_threads, found.learner_threads) == (3, 2)
    found = place_in(config(workers=2, ranks=1, rollout=4), nodes((4, 0), (4, 0), (4, 0)), "train")
    assert homes(found) == ("10.0.0.2", "10.0.0.3", "10.0.0.1") and found.learner_threads == 4
    found = place_in(config(workers=3, ranks=1), nodes((2, 0), (2, 0)), "train")
    assert (found.rollout_threads, found.learner_threads) == (1, 1)


def test_ranks_that_no_node_holds_are_on_as_few_as_possible() -> None:
    """The command's own first, although it is the smallest; then the largest."""
    found = place_in(config(workers=1, ranks=5, rollout=1, learner=1), nodes((2, 0), (2, 0), (3, 0)), "train")
    assert homes(found) == ("10.0.0.2", "10.0.0.1", "10.0.0.1", "10.0.0.3", "10.0.0.3", "10.0.0.3")
    assert (found.learner_node, found.spread_of_ranks()) == ("10.0.0.1", 2)
    assert place_in(config(ranks=4, learner=1), nodes((3, 0), (3, 0)), "sft").spread_of_ranks() == 2


def test_the_ranks_of_a_critic_are_counted_for_themselves() -> None:
    wanted = config(workers=1, ranks=2, rollout=1, learner=1)
    critic = dataclasses.replace(wanted.critic, side_by_side=True)
    wanted = dataclasses.replace(wanted, algo=dataclasses.replace(wanted.algo, name="ppo"), critic=critic)
    found = place_in(wanted, nodes((3, 0), (3, 0)), "train")
    assert homes(found) == ("10.0.0.2", *["10.0.0.1"] * 3, "10.0.0.2")
    assert (found.spread_of_ranks(), found.spread_of_ranks(critic=True)) == (1, 2)


def test_a_worker_that_spans_gpus_has_all_of_them_on_one_node() -> None:
    wanted = config(workers=3, ranks=4, parallel=2)
    found = place_in(wanted, nodes((16, 4), (16, 3), (16, 4)), "train")
    assert Counter(homes(found)[:3]) == {"10.0.0.2": 1, "10.0.0.3": 2} and found.learner_node == "10.0.0.1"
    assert found.rollout_num_gpus == 2.0 and found.learner_num_gpus == 1.0


def test_what_does_not_fit_on_gpus_does_not_run_on_cpus_instead() -> None:
    there = nodes((64, 0), (8, 2), (8, 2))
    found = place_in(config(workers=2, ranks=2), there, "train")
    assert (found.device, found.learner_node) == ("cuda", "10.0.0.2")
    with pytest.raises(ResourceError, match="need 5 GPUs"):
        place_in(config(workers=3, ranks=2), there, "train")


def test_an_evaluation_needs_no_learner() -> None:
    found = place_in(config(workers=3, rollout=2), nodes((2, 0), (2, 0), (2, 0)), "eval")
    assert homes(found) == ("10.0.0.1", "10.0.0.2", "10.0.0.3") and found.learner_node == ""


def test_workers_and_ranks_that_take_turns_share_places_on_every_node() -> None:
    found = place_in(config(workers=4, ranks=4, colocate=True), nodes((8, 2), (8, 2)), "train")
    assert homes(found) == ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2") * 2
    assert (found.rollout_threads, found.learner_threads, found.learner_num_gpus) == (4, 4, 0.5)
    assert bundles(found) == [
        {"CPU": 4.0, "GPU": 1.0, NODE + at: 0.001} for at in ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2")
    ]
    assert (found.first_rank, found.home, found.spread_of_ranks()) == (0, 0, 2)
    more = place_in(config(workers=1, ranks=3, rollout=2, learner=2, colocate=True), nodes((4, 0), (4, 0)), "train")
    assert more.rank_nodes == ("10.0.0.1", "10.0.0.1", "10.0.0.2") and more.worker_nodes == ("10.0.0.1",)
    assert (more.rollout_threads, more.learner_threads) == (2, 2)


def test_servers_are_where_the_weights_are_that_move_them() -> None:
    """The worker is on the other node; with a reference that moves the servers share the ranks' GPUs."""
    wanted, there = config(workers=2, ranks=2), nodes((8, 2), (8, 2))
    still = place_in(with_models(wanted, share=0.1), there, "train")
    assert (still.worker_nodes, still.scoring_places) == (("10.0.0.2",) * 2, (0,))
    moving = place_in(with_models(wanted, share=0.1, moves=5), there, "train")
    assert moving.scoring_places == (2,) and moving.learner_num_gpus == pytest.approx(0.9)
    own = place_in(with_models(config(workers=1, ranks=2)), there, "train")
    assert (own.scoring_places, own.server_nodes) == ((3,), ("10.0.0.2",))
    assert bundles(own)[3] == {"CPU": 0.0, "GPU": 1.0, NODE + "10.0.0.2": 0.001}


@pytest.mark.parametrize(
    ("wanted", "sizes", "command", "parts"),
    [
        (
            config(workers=1, ranks=3, learner=3),
            ((5, 0), (5, 0)),
            "train",
            [
                "learner.ranks 3 x 3 CPUs do not fit: 2 of them have a node, and 10.0.0.1 has 2 of 5 CPUs left",
                "lower learner.ranks or learner.cpus",
            ],
        ),
        (
            config(workers=2, ranks=2, rollout=3, learner=3),
            ((7, 0), (5, 0)),
            "train",
            ["rollout.workers 2 x 3 CPUs do not fit beside the learner: 1 of them", "10.0.0.1 has 1 of 7 CPUs left"],
        ),
        (
            config(workers=3, ranks=1, parallel=2),
            ((8, 2), (8, 5)),
            "train",
            [
                "rollout.workers 3 x 1 CPU and 2 GPUs do not fit beside the learner: 2 of them have a node, and ",
                "10.0.0.1 has 7 of 8 CPUs and 1 of 2 GPUs left, 10.0.0.2 has 6 of 8 CPUs and 1 of 5 GPUs left",
                "lower rollout.workers",
            ],
        ),
        (config(workers=9, rollout=1, learner=1), ((4, 0), (4, 0)), "train", ["10 CPUs", "there are 8 CPUs"]),
        (
            config(workers=3, ranks=1, rollout=2, colocate=True),
            ((3, 0), (3, 0)),
            "train",
            [
                "rollout.workers 3 x 2 CPUs of workers and ranks that take turns (cluster.colocate) do not fit: 2 of",
                "10.0.0.1 has 1 of 3 CPUs left",
            ],
        ),
        (
            with_models(config(workers=1, ranks=2), moves=1),
            ((8, 2), (8, 2)),
            "train",
            ["1 server with a model x 1 GPU", "on the node of the learner, whose weights they take: 0 of them"],
        ),
        (config(ranks=9, learner=1), ((4, 0), (4, 0)), "sft", ["learner.ranks 9", "there are 8 CPUs"]),
    ],
)
def test_what_does_not_fit_is_refused_by_node(
    wanted: Config, sizes: tuple[tuple[int, int], ...], command: Command, parts: list[str]
) -> None:
    with pytest.raises(ResourceError) as caught:
        place_in(wanted, nodes(*sizes), command)
    for part in parts:
        assert part in str(caught.value)


SIZE = st.tuples(st.integers(1, 9), st.integers(0, 4))


@given(
    sizes=st.lists(SIZE, min_size=1, max_size=4),
    workers=st.integers(1, 5),
    ranks=st.integers(1, 4),
    rollout=st.integers(0, 3),
    learner=st.integers(0, 3),
    parallel=st.integers(1, 2),
    device=st.sampled_from(["cpu", "auto"]),
    colocate=st.booleans(),
    share=st.sampled_from([0.1, 1.0]),
)
def test_no_node_is_overbooked(
    sizes: list[tuple[int, int]],
    workers: int,
    ranks: int,
    rollout: int,
    learner: int,
    parallel: int,
    device: str,
    colocate: bool,
    share: float,
) -> None:
    wanted = with_models(config(workers, ranks, rollout, learner, parallel, device=device, colocate=colocate), share)
    there = nodes(*sizes)
    try:
        found = place_in(wanted, there, "train")
    except ResourceError:
        return
    booked = bundles(found)
    places = max(workers, ranks) if colocate else workers + ranks
    assert len(booked) == places + (found.device == "cuda" and share == 1)
    assert found.rollout_threads >= 1 and found.learner_threads >= 1
    assert all(place < len(booked) for place in found.servers)
    if not homes(found):
        assert any(sum(b["CPU"] for b in booked) <= n.cpus and sum(b["GPU"] for b in booked) <= n.gpus for n in there)
        return
    for node in there:
        own = [bundle for bundle in booked if NODE + node.address in bundle]
        assert sum(bundle["CPU"] for bundle in own) <= node.cpus
        assert sum(bundle["GPU"] for bundle in own) <= node.gpus
    for at in range(len(booked)):
        taken = found.rollout_num_gpus * (at < workers)
        taken += found.learner_num_gpus * (0 <= at - found.first_rank < ranks)
        assert taken + found.server_num_gpus * found.servers.count(at) <= booked[at]["GPU"] + 1e-9


def test_gpus_that_nobody_uses_do_not_draw_workers() -> None:
    found = place_in(config(workers=3, ranks=1, rollout=3, learner=2, device="cpu"), nodes((4, 8), (10, 0)), "train")
    assert homes(found) == ("10.0.0.2",) * 3 + ("10.0.0.1",)
    full = place_in(config(workers=8, ranks=4, rollout=1, learner=1), nodes((4, 8), (16, 8)), "train")
    assert Counter(full.worker_nodes) == {"10.0.0.2": 8}, "the first has GPUs left, and no CPU"


def test_processes_of_a_worker_on_a_cpu_count_one_by_one() -> None:
    wanted = config(workers=2, ranks=1, parallel=2, learner=3)
    assert homes(place_in(wanted, nodes((3, 0), (2, 0), (2, 0)), "train"))[:2] == ("10.0.0.2", "10.0.0.3")
    pairs = place_in(config(workers=4, ranks=4, parallel=2, colocate=True), nodes((4, 0), (4, 0)), "train")
    assert homes(pairs)[:4] == ("10.0.0.1", "10.0.0.1", "10.0.0.2", "10.0.0.2") and pairs.rollout_threads == 2


def test_too_few_of_all_nodes_together_are_told_in_sum_and_by_node() -> None:
    with pytest.raises(ResourceError) as caught:
        place_in(config(workers=9, ranks=2, rollout=2), nodes((4, 0), (8, 0)), "train")
    said = str(caught.value)
    assert (
        "rollout.workers 9 x 2 CPUs each + learner.ranks 2 x 1 CPU each = 20 CPUs, but there are 12 CPUs; lower" in said
    )
    assert said.endswith("That is all 2 nodes together: 10.0.0.1 has 4 CPUs, 10.0.0.2 has 8 CPUs")
    with pytest.raises(ResourceError) as caught:
        place_in(config(workers=100, ranks=8), [*nodes(*((64, 8),) * 10), Machine(8, 0, "10.0.0.99")], "train")
    said = str(caught.value)
    assert "need 108 GPUs, but there are 80 GPUs" in said
    assert said.endswith("all 10 nodes (1 without a GPU not counted) together: 10 have 64 CPUs and 8 GPUs each")
    with pytest.raises(ResourceError) as caught:
        place_in(config(parallel=4, colocate=True), nodes((4, 1), (4, 1)), "train")
    assert "nodes together" not in str(caught.value), "more nodes would not help"


def test_enough_in_sum_and_too_little_on_each_is_told_as_that() -> None:
    with pytest.raises(ResourceError) as caught:
        place_in(config(workers=2, ranks=1, rollout=3), nodes((4, 0), (2, 0), (2, 0)), "train")
    assert str(caught.value).endswith("lower rollout.workers. In sum 7 of 8 CPUs on 3 nodes are asked for")
    with pytest.raises(ResourceError) as caught:
        place_in(config(workers=2, ranks=2, parallel=3), nodes((8, 4), (8, 4)), "train")
    assert "In sum 4 of 16 CPUs and 8 of 8 GPUs on 2 nodes are asked for" in str(caught.value)
    with pytest.raises(ResourceError) as caught:
        place_in(config(workers=2, ranks=2, learner=3, colocate=True), nodes((4, 0), (2, 0)), "train")
    assert str(caught.value).endswith("In sum 6 of 6 CPUs on 2 nodes are asked for")
