"""The devices of a placement: what is counted on which, and what is said of one that is too small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.planning.budget_lines import gpu_forecast, placement_or_why, split_line, too_large
from rlhf_dist.planning.device_memory import Device, devices, shared_memory
from rlhf_dist.planning.forecast import split_into
from rlhf_dist.planning.hardware import parse_cluster
from rlhf_dist.planning.memory import CUDA_CONTEXT, held_by_rank, learner_memory
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.shape import KNOWN

SHAPE = KNOWN["Qwen/Qwen2.5-7B"]
GB = 10**9


def config(colocate: bool = False, utilization: float = 0.85, algo: str = "grpo", **changes: Any) -> Config:
    base = Config()
    return replace(
        base,
        model=replace(base.model, path="Qwen/Qwen2.5-7B", dtype="bfloat16", gradient_checkpointing=True),
        rollout=replace(base.rollout, workers=4, gpu_memory_utilization=utilization),
        learner=replace(base.learner, ranks=4, zero_stage=3, micro_batch_tokens=8192),
        algo=replace(base.algo, name=algo),
        cluster=replace(base.cluster, colocate=colocate),
        **changes,
    )


def found(wanted: Config, cluster: str = "8xH100-80G") -> list[Device]:
    there = parse_cluster(cluster)
    capacity = there.gpu.memory if there.gpu else 0
    return devices(wanted, place_in(wanted, there.nodes, "train"), SHAPE, capacity)


def test_sides_of_their_own() -> None:
    worker, rank = found(config())
    assert (worker.name, worker.count, rank.name, rank.count) == ("rollout worker", 4, "learner rank", 4)
    loading = worker.parts["weights being loaded"]
    assert worker.total - loading == 0.85 * 80 * GB, "vLLM takes what it is given"
    assert loading == 2 * SHAPE.largest, "the embedding, anew beside the old one"
    assert worker.parts["weights"] == 2 * SHAPE.parameters
    # 28 layers, 4 heads of 128 for keys and as many for values, 2 bytes.
    assert worker.cache_tokens == worker.parts["key-value cache"] // (28 * 2 * 4 * 128 * 2)
    own = learner_memory(SHAPE, config().learner, "bfloat16", 4, True, "cuda", 384)
    assert rank.total == own.total + CUDA_CONTEXT and rank.fits
    assert shared_memory(config(), SHAPE) == 2 * 2 * SHAPE.parameters


def test_sides_that_take_turns_share_one_device() -> None:
    """While the engine samples, the rank keeps weights and optimizer; while the rank learns, the engine sleeps."""
    (both,) = found(config(colocate=True, utilization=0.5))
    worker, _ = found(config(utilization=0.5))
    kept = sum(held_by_rank(SHAPE, 3, "bfloat16", 4).values()) + CUDA_CONTEXT
    assert both.total == worker.total + kept and both.count == 4
    long = config(colocate=True, utilization=0.3)
    long = replace(long, learner=replace(long.learner, micro_batch_tokens=65536))
    (both_long,) = found(long)
    rank = found(replace(long, cluster=replace(long.cluster, colocate=False)))[1]
    assert both_long.total == rank.total + CUDA_CONTEXT, "learning is the worse moment"
    assert both.fits and not found(config(colocate=True))[0].fits, "0.85 of the memory, and a learner"
    (cpu,) = found(config(colocate=True), "16xCPU")
    assert {"rollout: key-value cache", "learner: activations"} <= set(cpu.parts), "nobody gives anything back"


def test_servers_and_critics_are_counted_where_they_are() -> None:
    judged = replace(Config().scoring, rewards={"judge": RewardSpec(kind="model", path="judge")})
    worker, rank = found(config(scoring=judged, utilization=0.7))
    assert worker.parts["scoring servers"] > 2 * SHAPE.parameters and "scoring servers" not in rank.parts
    kl = replace(config(algo="ppo").algo, kl=replace(Config().algo.kl, coef=0.05))
    ppo = config(algo="ppo", utilization=0.7, reference=replace(Config().reference, replicas=1))
    worker, rank = found(replace(ppo, algo=kl))
    assert "reference servers" in worker.parts and rank.parts["critic"] > 10 * GB
    own = replace(ppo, algo=kl, cluster=replace(ppo.cluster, server_gpu_share=1.0))
    assert [(one.name, one.count) for one in found(own, "9xH100-80G")][2] == ("server", 1)
    apart = replace(ppo, critic=replace(ppo.critic, side_by_side=True))
    names = [(one.name, one.count) for one in found(apart, "12xH100-80G")]
    assert names == [("rollout worker", 4), ("learner rank", 4), ("critic rank", 4)]


def test_what_does_not_fit_is_said_with_the_keys_that_help() -> None:
    plain = replace(config(), model=replace(config().model, gradient_checkpointing=False))
    plain = replace(plain, learner=replace(plain.learner, zero_stage=1))
    said = too_large(plain, found(plain))
    assert said.startswith("a learner rank needs ") and " GB of 80: set model.gradient_checkpointing to true" in said
    assert (
        "set learner.zero_stage to 3, set learner.offload to optimizer and learner.zero_stage to 2" in said
        and "lower learner.micro_batch_tokens (8192)" in said
    )
    assert too_large(config(), found(config())) == ""
    small = too_large(config(utilization=0.7), found(config(utilization=0.7), "8xL4-24G"))
    assert "has no room for a key-value cache: raise rollout.tensor_parallel" in small
    assert "lower rollout.gpu_memory_utilization" in too_large(config(True), found(config(True)))


def test_servers_that_are_too_much_can_have_gpus_of_their_own() -> None:
    judged = replace(Config().scoring, rewards={"judge": RewardSpec(kind="model", path="judge")})
    said = too_large(config(scoring=judged), found(config(scoring=judged)))
    assert said.startswith("a rollout worker needs ") and ": lower rollout.gpu_memory_utilization (0.85), set " in said
    assert "set cluster.server_gpu_share to 1" in said


def test_a_server_counts_wherever_it_is() -> None:
    """The reference moves, so it is beside a worker on the learner's node, which is not the first worker."""
    reference = replace(Config().reference, update_every=5)
    wanted = config(utilization=0.85, reference=reference)
    wanted = replace(
        wanted,
        rollout=replace(wanted.rollout, workers=10),
        algo=replace(wanted.algo, kl=replace(wanted.algo.kl, coef=0.05)),
    )
    placed = place_in(wanted, parse_cluster("2x8xH100-80G").nodes, "train")
    assert placed.scoring_places != (0,)
    worker, _ = found(wanted, "2x8xH100-80G")
    assert worker.parts["scoring servers"] > 15 * GB and not worker.fits


def test_a_moving_average_is_in_the_hosts_memory_and_a_mask_policy_on_both_sides() -> None:
    average = replace(config(), learner=replace(config().learner, ema_decay=0.99))
    assert [one.total for one in found(average)] == [one.total for one in found(config())]
    for nlpo, ppo in zip(found(config(algo="nlpo")), found(config(algo="ppo")), strict=True):
        assert nlpo.parts["mask policy"] == 2 * SHAPE.parameters and "mask policy" not in ppo.parts


def test_colocated_engines_without_room_for_a_cache_are_said() -> None:
    said = too_large(config(True, 0.2), found(config(True, 0.2)))
    assert "has no room for a key-value cache" in said and "raise rollout.gpu_memory_utilization (0.2)" in said


def test_only_what_is_held_at_the_peak_is_made_smaller() -> None:
    """Engines sample beside a large cache while nothing of the learner but its share of the optimizer is there."""
    both = config(True, 0.85)
    said = too_large(both, found(both))
    assert "lower rollout.gpu_memory_utilization (0.85)" in said and "set learner.offload to optimizer" in said
    assert "micro_batch_tokens" not in said and "gradient_checkpointing" not in said
    (pair,) = found(replace(both, learner=replace(both.learner, offload="optimizer")))
    assert pair.total < found(both)[0].total


def test_places_that_have_one_side_only_are_told_apart() -> None:
    fewer = config(colocate=True, utilization=0.3)
    fewer = replace(fewer, rollout=replace(fewer.rollout, workers=1))
    assert [(one.name, one.count) for one in found(fewer)] == [
        ("pair of rollout worker and learner rank", 1),
        ("learner rank", 3),
    ]
    ppo = config(colocate=True, utilization=0.3, algo="ppo")
    ppo = replace(ppo, critic=replace(ppo.critic, side_by_side=True))
    assert [(one.name, one.count) for one in found(ppo)] == [
        ("pair of rollout worker and learner rank", 4),
        ("critic rank", 4),
    ]


def test_a_split_that_the_plan_would_reject_is_not_recommended() -> None:
    """With fewer workers two servers would share one's GPU."""
    wanted = config()
    eight = parse_cluster("8xH100-80G")

    def why(given: Config, workers: int, ranks: int) -> str:
        placed = placement_or_why(split_into(given, workers, ranks), eight, SHAPE)
        return placed if isinstance(placed, str) else ""

    assert why(wanted, 3, 5) == ""
    kl = replace(wanted.algo, kl=replace(wanted.algo.kl, coef=0.05))
    served = replace(wanted, algo=kl, reference=replace(wanted.reference, replicas=4))
    served = replace(served, cluster=replace(served.cluster, server_gpu_share=0.15))
    assert why(served, 3, 5) and ";" not in why(served, 3, 5)
    assert "need 16 GPUs" in why(wanted, 8, 8)
    small = parse_cluster("8xH100-80G,20G")
    assert "of main memory and have 20" in str(placement_or_why(split_into(wanted, 3, 5), small, SHAPE))


def test_a_faster_split_that_does_not_fit_is_said_with_the_reason() -> None:
    eight, refused = parse_cluster("8xH100-80G"), (50.0, 8, 8)
    said = split_line(config(), eight, SHAPE, [refused], too_small=False)
    assert said.startswith(
        "no other that fits is more than 5% faster; rollout.workers=8 learner.ranks=8 would take 50 s"
    )
    assert ", but rollout.workers 8 " in said
    assert split_line(config(), eight, SHAPE, [refused, (60.0, 3, 5)], False).startswith("rollout.workers=3 learner.")
    assert split_line(config(), eight, SHAPE, [], too_small=False) == "no other is more than 5% faster"
    assert split_line(config(), eight, SHAPE, [refused], too_small=True) == ""


def test_a_faster_transport_is_named_where_it_can_be_used() -> None:
    wanted, eight = config(), parse_cluster("8xH100-80G")

    def lines(given: Config) -> list[str]:
        placed = place_in(given, eight.nodes, "train")
        return gpu_forecast(given, placed, SHAPE, eight, found(given), 0)

    assert [line for line in lines(wanted) if line.startswith("weights.transport=broadcast would take ")]
    assert [line for line in lines(config(True, 0.5)) if line.startswith("weights.transport=ipc would take ")]
    sent = replace(wanted, weights=replace(wanted.weights, transport="broadcast"))
    delta = replace(wanted, learner=replace(wanted.learner, delta_push=True))
    assert not [line for line in lines(sent) + lines(delta) if "weights.transport=" in line]
    assert "oldest" not in "".join(lines(wanted))


def test_each_process_of_a_worker_on_a_cpu_has_its_part_of_the_cache() -> None:
    one = replace(config(), rollout=replace(config().rollout, workers=1), learner=replace(config().learner, ranks=1))
    two = replace(one, rollout=replace(one.rollout, tensor_parallel=2))
    (plain, _), (shared, _) = found(one, "16xCPU"), found(two, "16xCPU")
    assert (plain.count, shared.count) == (1, 2)
    assert shared.parts["key-value cache"] == plain.parts["key-value cache"] // 2
    assert shared.cache_tokens == plain.cache_tokens
