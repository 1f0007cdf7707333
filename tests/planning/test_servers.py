"""Servers with a model on GPUs: where they are, what they book, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
from test_placement import config, lines

from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.errors import ResourceError
from rlhf_dist.planning.placement import Machine, bundles, place


def judged(wanted: Config, scorers: int = 1, references: int = 0, share: float = 0.1, moves: int = 0) -> Config:
    """With a reward model and a reference."""
    return dataclasses.replace(
        wanted,
        scoring=dataclasses.replace(
            wanted.scoring, replicas=scorers, rewards={"judge": RewardSpec(kind="model", path="judge")}
        ),
        algo=dataclasses.replace(wanted.algo, kl=dataclasses.replace(wanted.algo.kl, coef=0.05)),
        reference=dataclasses.replace(wanted.reference, replicas=references, update_every=moves),
        cluster=dataclasses.replace(wanted.cluster, server_gpu_share=share),
    )


def test_servers_with_a_model_book_a_share_of_a_rollout_workers_gpu() -> None:
    """Three servers over two workers: one GPU has two of them, and no worker books more than what that leaves."""
    wanted = judged(config(workers=2, ranks=2, colocate=False), scorers=2, references=1, share=0.05)
    p = place(wanted, Machine(16, 4), "train")
    assert (p.scoring_places, p.reference_places, p.server_num_gpus) == ((0, 1), (0,), 0.05)
    assert (p.rollout_num_gpus, p.learner_num_gpus) == (pytest.approx(0.9), 1.0)
    assert bundles(p)[0]["GPU"] == 1.0, "worker and servers share one whole GPU"
    assert "GPUs of scoring: 3 servers with a model, each 0.05 of a rollout worker's GPU and of its memory" in lines(
        wanted, Machine(16, 4), "train"
    )
    shared = place(judged(config(workers=2, ranks=2)), Machine(16, 2), "train")
    assert (shared.rollout_num_gpus, shared.learner_num_gpus) == (pytest.approx(0.45), pytest.approx(0.45))
    without = place(config(workers=2, ranks=2), Machine(16, 2), "train")
    assert (without.servers, without.rollout_num_gpus) == ((), 0.5), "the task's own reward needs no GPU"
    assert place(judged(config(workers=2, ranks=2)), Machine(16, 0), "train").servers == (), "nor has a CPU shares"


def test_servers_beside_workers_that_span_gpus_are_with_the_ranks() -> None:
    p = place(judged(config(workers=1, ranks=2, parallel=2, colocate=False)), Machine(16, 4), "train")
    assert (p.scoring_places, p.rollout_num_gpus, p.learner_num_gpus) == ((1,), 2.0, pytest.approx(0.9))


def test_a_server_can_have_a_gpu_of_its_own() -> None:
    wanted = judged(config(workers=1, ranks=1, colocate=False), references=1, share=1.0)
    p = place(wanted, Machine(16, 4), "train")
    assert (p.scoring_places, p.reference_places, p.rollout_num_gpus) == ((2,), (3,), 1.0)
    assert [bundle["GPU"] for bundle in bundles(p)] == [1.0] * 4
    with pytest.raises(ResourceError, match=r"2 servers with a model \(cluster.server_gpu_share 1\) need 4 GPUs"):
        place(wanted, Machine(16, 3), "train")


@pytest.mark.parametrize(
    ("scorers", "share", "utilization", "said"),
    [
        (1, 0.2, 0.85, "1 server with a model, each with cluster.server_gpu_share 0.2 of a GPU, beside rollout.gpu_m"),
        (3, 0.1, 0.8, "come to 1.1 GPUs; lower one of them, scoring.replicas or reference.replicas, or set cluster.s"),
    ],
)
def test_memory_that_is_promised_twice_is_refused(scorers: int, share: float, utilization: float, said: str) -> None:
    wanted = judged(config(colocate=False), scorers=scorers, share=share)
    wanted = dataclasses.replace(
        wanted, rollout=dataclasses.replace(wanted.rollout, gpu_memory_utilization=utilization)
    )
    with pytest.raises(ResourceError) as caught:
        place(wanted, Machine(16, 2), "train")
    assert said in str(caught.value)


def test_servers_do_not_share_with_workers_that_span_gpus_where_there_is_no_learner() -> None:
    wanted = judged(config(workers=1, parallel=2, colocate=False))
    with pytest.raises(ResourceError, match=r"cannot share a GPU .* \(rollout\.tensor_parallel 2\)"):
        place(wanted, Machine(16, 4), "eval")
    own = dataclasses.replace(wanted, cluster=dataclasses.replace(wanted.cluster, server_gpu_share=1.0))
    assert place(own, Machine(16, 4), "eval").scoring_places == (1,)


def test_an_optimizer_is_not_taken_off_gpus_that_are_not_there() -> None:
    wanted = config()
    wanted = dataclasses.replace(wanted, learner=dataclasses.replace(wanted.learner, offload="optimizer", zero_stage=2))
    assert place(wanted, Machine(8, 1), "train").device == "cuda"
    with pytest.raises(ResourceError, match=r"learner\.offload is optimizer, and there is no GPU"):
        place(wanted, Machine(8, 0), "train")


def test_a_share_of_gpus_that_are_not_there_is_refused() -> None:
    wanted = config()
    wanted = dataclasses.replace(wanted, cluster=dataclasses.replace(wanted.cluster, server_gpu_share=0.5))
    with pytest.raises(ResourceError, match=r"cluster\.server_gpu_share is 0\.5, and there is no GPU"):
        place(wanted, Machine(8, 0), "train")
