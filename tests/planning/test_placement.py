"""Placement is arithmetic: what fits, what does not, and how it is said."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.config.schema import ClusterConfig, Config, LearnerConfig, RolloutConfig
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning import placement
from rlhf_dist.planning.placement import (
    Command,
    Machine,
    bundles,
    cpu_quota,
    local_machine,
    place,
)
from rlhf_dist.planning.plan_lines import describe


def config(
    workers: int = 1, ranks: int = 1, rollout_cpus: int = 0, learner_cpus: int = 0, parallel: int = 1, **cluster: object
) -> Config:
    base = Config()
    return dataclasses.replace(
        base,
        rollout=dataclasses.replace(base.rollout, workers=workers, cpus=rollout_cpus, tensor_parallel=parallel),
        learner=dataclasses.replace(base.learner, ranks=ranks, cpus=learner_cpus),
        cluster=dataclasses.replace(base.cluster, **cluster),
    )


def lagging(wanted: Config) -> Config:
    return dataclasses.replace(wanted, loop=dataclasses.replace(wanted.loop, max_policy_lag=1))


def test_sides_that_take_turns_on_gpus_cannot_run_at_once() -> None:
    """On CPUs they share threads, which the system divides; an engine on a shared GPU sleeps in between."""
    gpus = Machine(cpus=8, gpus=2)
    for device in ("auto", "cuda"):
        with pytest.raises(ResourceError, match=r"max_policy_lag is 1 with cluster\.colocate true on GPUs.*to false"):
            place(lagging(config(device=device)), gpus, "train")
    assert place(lagging(config(colocate=False)), gpus, "train").device == "cuda"
    assert place(lagging(config()), gpus, "eval").device == "cuda", "one side only"
    assert place(lagging(config(device="cpu")), gpus, "train").device == "cpu"
    assert place(config(), gpus, "train").device == "cuda"


def side_by_side(wanted: Config, start: str = "policy", name: Any = "ppo") -> Config:
    critic = dataclasses.replace(wanted.critic, side_by_side=True, start=start)
    return dataclasses.replace(wanted, algo=dataclasses.replace(wanted.algo, name=name), critic=critic)


def test_colocated_sides_take_turns_on_the_whole_machine() -> None:
    p = place(config(workers=2, ranks=1), Machine(cpus=8, gpus=0), "train")
    assert (p.device, p.rollout_workers, p.learner_ranks) == ("cpu", 2, 1)
    assert (p.rollout_threads, p.learner_threads) == (4, 8)
    assert (p.rollout_num_cpus, p.learner_num_cpus) == (2.0, 4.0)
    assert (p.rollout_gpus, p.learner_gpus, p.rollout_num_gpus, p.learner_num_gpus) == (0, 0, 0.0, 0.0)


def test_two_cpus_hold_two_workers_and_two_ranks_colocated() -> None:
    p = place(config(workers=2, ranks=2), Machine(cpus=2, gpus=0), "train")
    assert (p.rollout_threads, p.learner_threads, p.rollout_num_cpus, p.learner_num_cpus) == (1, 1, 0.5, 0.5)


def test_apart_each_actor_has_an_equal_share_and_rollout_the_rest() -> None:
    p = place(config(workers=1, ranks=2, colocate=False), Machine(cpus=8, gpus=0), "train")
    assert (p.rollout_threads, p.learner_threads) == (4, 2)
    assert (p.rollout_num_cpus, p.learner_num_cpus) == (4.0, 2.0)


@pytest.mark.parametrize(("rollout", "learner", "expected"), [(3, 0, (3, 2)), (0, 3, (1, 3)), (2, 1, (2, 1))])
def test_apart_numbers_of_the_config_are_kept(rollout: int, learner: int, expected: tuple[int, int]) -> None:
    wanted = config(workers=2, ranks=2, rollout_cpus=rollout, learner_cpus=learner, colocate=False)
    p = place(wanted, Machine(cpus=10 if rollout else 9, gpus=0), "train")
    assert (p.rollout_threads, p.learner_threads) == expected


def test_sft_places_only_the_learner_and_eval_only_the_rollout() -> None:
    wanted, machine = config(workers=2, ranks=3), Machine(cpus=6, gpus=0)
    sft, evaluation = place(wanted, machine, "sft"), place(wanted, machine, "eval")
    assert (sft.rollout_workers, sft.rollout_threads, sft.learner_ranks, sft.learner_num_cpus) == (0, 0, 3, 2.0)
    assert (evaluation.learner_ranks, evaluation.rollout_workers, evaluation.rollout_num_cpus) == (0, 2, 3.0)


def test_a_reward_model_is_trained_where_nothing_is_sampled() -> None:
    p = place(config(workers=2, ranks=3), Machine(cpus=6, gpus=0), "reward")
    assert (p.rollout_workers, p.rollout_threads, p.learner_ranks, p.learner_threads, p.critic_ranks) == (0, 0, 3, 2, 0)
    assert bundles(p) == [{"CPU": 2.0, "GPU": 0.0}] * 3
    gpu = place(config(workers=2, ranks=2), Machine(cpus=6, gpus=2), "reward")
    assert (gpu.learner_gpus, gpu.learner_num_gpus, gpu.rollout_gpus) == (1, 1.0, 0)


def test_a_critic_beside_the_policy_has_as_many_ranks_of_its_own() -> None:
    """8 CPUs: 2 policy and 2 critic ranks at 2 threads each, in turn with 1 worker on all 8."""
    wanted = side_by_side(config(workers=1, ranks=2))
    p = place(wanted, Machine(cpus=8, gpus=0), "train")
    assert (p.learner_ranks, p.critic_ranks, p.learner_threads, p.learner_num_cpus) == (4, 2, 2, 1.0)
    assert (p.rollout_threads, p.rollout_num_cpus) == (8, 4.0)
    assert bundles(p) == [{"CPU": 5.0, "GPU": 0.0}, *[{"CPU": 1.0, "GPU": 0.0}] * 3]
    for command in ("sft", "reward", "prefer"):
        assert place(wanted, Machine(8, 0), command).learner_ranks == 2, "which have no critic"


def test_a_critic_that_takes_turns_or_shares_the_trunk_needs_no_ranks() -> None:
    in_turn = dataclasses.replace(config(), algo=dataclasses.replace(Config().algo, name="ppo"))
    for wanted in (in_turn, side_by_side(config(), start="shared"), side_by_side(config(), name="grpo")):
        p = place(wanted, Machine(2, 0), "train")
        assert (p.learner_ranks, p.critic_ranks) == (1, 0)


def test_a_critic_beside_the_policy_has_gpus_of_its_own() -> None:
    p = place(side_by_side(config(workers=4, ranks=2)), Machine(cpus=16, gpus=4), "train")
    assert (p.learner_ranks, p.critic_ranks, p.learner_gpus, p.learner_num_gpus) == (4, 2, 1, 0.5)
    assert bundles(p) == [{"CPU": 4.0, "GPU": 1.0}] * 4
    apart = place(side_by_side(config(workers=2, ranks=1, colocate=False)), Machine(cpus=16, gpus=4), "train")
    assert [bundle["GPU"] for bundle in bundles(apart)] == [1.0] * 4
    assert apart.first_rank == 2


def test_gpus_are_halved_in_rays_books_when_colocated() -> None:
    p = place(config(workers=2, ranks=2), Machine(cpus=16, gpus=2), "train")
    assert (p.device, p.rollout_gpus, p.learner_gpus, p.rollout_num_gpus, p.learner_num_gpus) == (
        "cuda",
        1,
        1,
        0.5,
        0.5,
    )


def test_gpus_apart_are_whole() -> None:
    p = place(config(workers=2, ranks=4, parallel=2, colocate=False), Machine(cpus=16, gpus=8), "train")
    assert (p.rollout_gpus, p.rollout_num_gpus, p.learner_gpus, p.learner_num_gpus) == (2, 2.0, 1, 1.0)


def test_device_cpu_leaves_the_gpus_alone() -> None:
    p = place(config(device="cpu"), Machine(cpus=2, gpus=4), "train")
    assert (p.device, p.rollout_num_gpus, p.learner_num_gpus) == ("cpu", 0.0, 0.0)


@pytest.mark.parametrize(
    ("wanted", "machine", "command", "parts"),
    [
        (config(workers=3), Machine(2, 0), "train", ["rollout.workers 3 x 1 CPU each = 3 CPUs", "there are 2 CPUs"]),
        (config(ranks=3), Machine(2, 0), "sft", ["learner.ranks 3", "= 3 CPUs", "lower learner.ranks"]),
        (
            config(workers=2, rollout_cpus=3),
            Machine(4, 0),
            "eval",
            ["rollout.workers 2 x 3 CPUs each = 6", "rollout.cpus"],
        ),
        (config(colocate=False), Machine(1, 0), "train", ["= 2 CPUs", "there is 1 CPU", "cluster.colocate=true"]),
        (config(device="cuda"), Machine(4, 0), "train", ["cluster.device is cuda", "no GPU"]),
        (config(ranks=3), Machine(8, 2), "train", ["learner.ranks 3 need 3 GPUs", "there are 2 GPUs"]),
        (config(workers=1, ranks=2, colocate=False), Machine(8, 2), "train", ["3 GPUs", "cluster.colocate=true"]),
        (side_by_side(config(ranks=2)), Machine(2, 0), "train", ["= 4 CPUs", "there are 2 CPUs"]),
        (side_by_side(config(ranks=2)), Machine(8, 3), "train", ["4 GPUs", "there are 3 GPUs"]),
        (config(parallel=2), Machine(8, 2), "train", ["rollout.tensor_parallel is 2", "cluster.colocate to false"]),
        (
            config(parallel=2, rollout_cpus=1),
            Machine(8, 0),
            "train",
            ["rollout.tensor_parallel is 2, but a rollout worker has 1 CPU thread", "rollout.cpus to 2 or more"],
        ),
    ],
)
def test_what_does_not_fit_is_refused(wanted: Config, machine: Machine, command: Command, parts: list[str]) -> None:
    with pytest.raises(ResourceError) as caught:
        place(wanted, machine, command)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


SMALL = st.integers(1, 5)
CPUS = st.integers(0, 4)


@given(
    SMALL,
    SMALL,
    CPUS,
    CPUS,
    st.booleans(),
    st.integers(1, 24),
    st.integers(0, 8),
    st.sampled_from(["train", "sft", "reward", "eval"]),
    st.booleans(),
)
def test_ray_can_always_book_what_was_placed(
    workers: int,
    ranks: int,
    rollout: int,
    learner: int,
    colocate: bool,
    cpus: int,
    gpus: int,
    command: Command,
    beside: bool,
) -> None:
    wanted = config(workers, ranks, rollout, learner, colocate=colocate)
    wanted = side_by_side(wanted) if beside else wanted
    try:
        p = place(wanted, Machine(cpus, gpus), command)
    except ResourceError:
        return
    assert p.rollout_workers * p.rollout_num_cpus + p.learner_ranks * p.learner_num_cpus <= cpus
    assert p.rollout_workers * p.rollout_num_gpus + p.learner_ranks * p.learner_num_gpus <= gpus
    assert p.rollout_workers * p.rollout_threads <= cpus and p.learner_ranks * p.learner_threads <= cpus
    assert (p.rollout_threads >= 1) == (p.rollout_workers > 0)
    assert (p.learner_threads >= 1) == (p.learner_ranks > 0)
    assert p.critic_ranks == (ranks if beside and command == "train" else 0)
    assert p.learner_ranks == (0 if command == "eval" else ranks + p.critic_ranks)
    booked = bundles(p)
    assert sum(bundle["CPU"] for bundle in booked) <= cpus and sum(bundle["GPU"] for bundle in booked) <= gpus
    assert p.first_rank + p.learner_ranks <= len(booked)


def test_describe_does_the_arithmetic() -> None:
    text = "\n".join(describe(place(config(), Machine(2, 0), "train"), Config(), "train"))
    assert "16 prompts x 8 samples = 128 responses" in text
    assert "100 steps, 12,800 responses, 100 optimizer steps" in text
    assert "rollout: 1 worker, each 2 CPU threads (shared, so each books half in Ray: 1 CPU)" in text
    assert "runs/run" in text


@pytest.mark.parametrize(
    ("colocate", "lag", "said"),
    [
        (True, 0, "rollout and learner take turns on the same devices;"),
        (False, 0, "rollout and learner have devices of their own, and take turns;"),
        (True, 3, "rollout and learner share the devices, and work at once, on tokens at most 3 versions old;"),
        (False, 1, "rollout and learner have devices of their own, and work at once, on tokens at most 1 version old;"),
    ],
)
def test_describe_says_whether_the_halves_work_at_once(colocate: bool, lag: int, said: str) -> None:
    wanted = config(colocate=colocate)
    wanted = dataclasses.replace(wanted, loop=dataclasses.replace(wanted.loop, max_policy_lag=lag))
    assert said in "\n".join(lines(wanted, Machine(2, 0), "train"))


def test_describe_leaves_out_what_the_command_has_not() -> None:
    sft = "\n".join(describe(place(config(), Machine(2, 0), "sft"), Config(), "sft"))
    evaluation = "\n".join(describe(place(config(), Machine(2, 0), "eval"), Config(), "eval"))
    assert "rollout" not in sft and "64 sequences" in sft
    assert "learner" not in evaluation and "128 held-out prompts" in evaluation


def lines(wanted: Config, machine: Machine, command: Command) -> list[str]:
    return describe(place(wanted, machine, command), wanted, command)


def test_describe_tells_of_the_critics_ranks_the_servers_and_the_passes() -> None:
    wanted = side_by_side(config(ranks=2))
    wanted = dataclasses.replace(
        wanted,
        learner=dataclasses.replace(wanted.learner, epochs=4, updates_per_batch=2),
        scoring=dataclasses.replace(wanted.scoring, replicas=2),
        reference=dataclasses.replace(wanted.reference, replicas=1),
        algo=dataclasses.replace(wanted.algo, kl=dataclasses.replace(wanted.algo.kl, coef=0.05)),
    )
    text = "\n".join(lines(wanted, Machine(4, 0), "train"))
    assert "learner: 4 ranks, ZeRO-0 (2 of them the critic's own), each 1 CPU thread (shared, so" in text
    assert "scoring: 2 scoring servers and 1 reference server, each 2 CPU threads" in text
    assert "2 optimizer steps of 64 responses each, 4 passes" in text
    assert "100 steps, 12,800 responses, 800 optimizer steps" in text
    assert "critic" not in "\n".join(lines(config(), Machine(2, 0), "train"))
    assert "reference" not in "\n".join(lines(wanted, Machine(4, 0), "eval"))


def test_describe_of_a_reward_model() -> None:
    text = "\n".join(lines(config(ranks=2), Machine(2, 0), "reward"))
    assert "step: 64 judgements of at most 512 tokens a response" in text
    assert "run: at most 300 optimizer steps, 19,200 judgements" in text
    assert "rollout" not in text and "held-out prompts" not in text


def test_local_machine_has_a_cpu() -> None:
    assert local_machine().cpus >= 1


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("max 100000\n", None), ("150000 100000\n", 2), ("400000 100000\n", 4), ("20000 100000\n", 1), ("", None)],
)
def test_a_containers_quota_is_read_in_whole_cpus(tmp_path: Path, text: str, cpus: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert cpu_quota(tmp_path / "cpu.max") == cpus
    assert cpu_quota(tmp_path / "no") is None


def test_a_containers_quota_limits_what_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    for quota, cpus in ((3, 3), (None, 64), (100, 64)):
        monkeypatch.setattr(placement, "cpu_quota", lambda path, quota=quota: quota)
        assert local_machine().cpus == cpus


def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert local_machine().gpus == 0


def test_colocated_actors_share_a_place_and_a_whole_gpu() -> None:
    """Two workers and two ranks on two GPUs: worker i and rank i on one GPU, never two ranks on one."""
    config = Config(
        rollout=RolloutConfig(workers=2), learner=LearnerConfig(ranks=2), cluster=ClusterConfig(device="cuda")
    )
    placement = place(config, Machine(cpus=8, gpus=2), "train")
    assert bundles(placement) == [{"CPU": 4.0, "GPU": 1.0}] * 2
    assert placement.first_rank == 0


def test_a_place_is_reserved_for_each_actor_that_has_its_own() -> None:
    config = Config(
        rollout=RolloutConfig(workers=3, cpus=1),
        learner=LearnerConfig(ranks=1, cpus=2),
        cluster=ClusterConfig(device="cpu", colocate=False),
    )
    placement = place(config, Machine(cpus=8, gpus=0), "train")
    assert bundles(placement) == [{"CPU": 1.0, "GPU": 0.0}] * 3 + [{"CPU": 2.0, "GPU": 0.0}]
    assert placement.first_rank == 3
