"""The forecast: worked by hand with rates that make each part visible, and how it moves with the config."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from rlhf_dist.config.schema import Config
from rlhf_dist.planning.forecast import (
    HOST_BANDWIDTH,
    HOST_THREAD,
    LINK,
    Forecast,
    Lengths,
    Rates,
    assumed_lengths,
    forecast,
    gpu_rates,
    splits,
)
from rlhf_dist.planning.hardware import KINDS
from rlhf_dist.planning.nodes import place_in
from rlhf_dist.planning.placement import Machine, Placement, place
from rlhf_dist.planning.shape import gated
from rlhf_dist.planning.transports import NETWORK

SHAPE = gated(2, 8, 16, 2, 1, 100, tied=True)
NEVER = 1e30
IDLE = Rates(
    products=NEVER,
    learning=NEVER,
    bandwidth=NEVER,
    kept=NEVER,
    block=8,
    call_s=0,
    segment_s=0,
    decode_layer_s=0,
    decode_s=0,
    sequence_s=0,
    request_s=0,
    step_s=0,
    push_s=0,
    write=NEVER,
    load=NEVER,
)


def speed(rate: float) -> dict[str, float]:
    """Of matrix products, wherever they are computed."""
    return {"products": rate, "learning": rate}


LENGTHS = Lengths(prompt=10, response=20, longest=50)


def config(workers: int = 2, ranks: int = 2, lag: int = 0, **algo: Any) -> Config:
    """16 prompts x 8 responses a step."""
    base = Config()
    return replace(
        base,
        rollout=replace(base.rollout, workers=workers, cpus=1),
        learner=replace(base.learner, ranks=ranks, cpus=1, micro_batch_tokens=1000),
        algo=replace(base.algo, **algo),
        loop=replace(base.loop, max_policy_lag=lag),
        cluster=replace(base.cluster, colocate=False, device="cpu"),
    )


def placed(wanted: Config) -> Placement:
    return place(wanted, Machine(64, 0), "train")


def of(wanted: Config, cache_tokens: int = 0, **rates: float) -> Forecast:
    return forecast(wanted, placed(wanted), SHAPE, replace(IDLE, **rates), LENGTHS, cache_tokens)


def test_decoding_goes_on_for_as_long_as_the_longest_response() -> None:
    """64 responses an engine, all at once: 50 steps; with room for 8 of them it takes 64 x 20 / 8 steps."""
    assert of(config(), decode_s=0.1).generate == pytest.approx(50 * 0.1)
    assert of(config(), sequence_s=0.001).generate == pytest.approx(64 * 20 * 0.001)
    assert of(config(), cache_tokens=8 * 30, decode_s=0.1).generate == pytest.approx(160 * 0.1)
    few = config()
    few = replace(few, rollout=replace(few.rollout, max_concurrent=4))
    assert of(few, decode_s=0.1).generate == pytest.approx(320 * 0.1)
    # Two layers, each step.
    assert of(config(), decode_layer_s=0.01).generate == pytest.approx(50 * 2 * 0.01)


def test_an_engines_gpus_share_the_cache_no_further_than_its_heads() -> None:
    """One head of keys and values, so that each of 2 GPUs reads all of it, and half of the weights."""
    wanted, placement = on_gpus()
    spanned = replace(placement, rollout_workers=2, rollout_gpus=2)
    found = forecast(wanted, spanned, SHAPE, replace(IDLE, bandwidth=1e6), LENGTHS, 0)
    weights, cache = 4 * SHAPE.products / 2, 4 * SHAPE.kv_elements * (10 + 20 / 2)
    assert found.generate == pytest.approx((50 * weights + 64 * 20 * cache) / 1e6)


def test_requests_updates_pushes_and_sequences_have_a_cost_of_their_own() -> None:
    """64 responses an engine and a rank; two layers, and a pass both ways is three forward."""
    assert of(config(), request_s=0.01).generate == pytest.approx(64 * 0.01)
    assert of(config(), step_s=0.5).train == pytest.approx(0.5)
    assert of(config(), push_s=0.25).sync == pytest.approx(0.25)
    assert of(config(), segment_s=0.001).train == pytest.approx(64 * 2 * 3 * 0.001)
    assert of(config(), kept=1e6).train > 1e-3 > of(config(), kept=math.inf).train


def test_samples_share_whole_blocks_of_their_prompt() -> None:
    """Of 10 tokens the first 8 once a group of 8; with blocks of 16 none, with blocks of 5 all."""
    operations = 2 * SHAPE.parameters

    def found(block: int) -> float:
        rates = replace(IDLE, block=block, **speed(1.0))
        few = replace(LENGTHS, response=0.0, longest=0.0)
        return forecast(config(), placed(config()), SHAPE, rates, few, 0).generate / operations

    assert [found(8), found(16), found(5)] == pytest.approx([64 * 2 + 8 * 8, 64 * 10, 8 * 10])


def test_products_are_two_operations_a_weight_forward_and_six_both_ways() -> None:
    """Of 1,600 operations a second; a rank has 64 responses of 30 tokens."""
    found = of(config(), **speed(1600.0))
    attention = 2 * 2 * 4 * 30
    assert found.train == pytest.approx(64 * 30 * 6 * (SHAPE.parameters + attention) / 1600)
    prompts, tokens = 64 * 2 + 64 / 8 * 8, 64 * 20  # whole blocks of 8 once a group
    assert found.generate == pytest.approx((prompts + tokens) * 2 * SHAPE.parameters / 1600)
    half = forecast(
        config(),
        placed(config()),
        SHAPE,
        replace(IDLE, **speed(1600.0)),
        replace(LENGTHS, trained=0.5),
        0,
    )
    assert half.train == pytest.approx(found.train / 2), "responses without a gradient are left out"
    several = replace(config(), learner=replace(config().learner, updates_per_batch=2, epochs=3))
    more = of(several, **speed(1600.0))
    assert more.train == pytest.approx(found.train * (3 + 1 / 3)), "three passes, and the old logprobs"


def test_an_offloaded_optimizer_steps_at_the_hosts_rate() -> None:
    """Of 2 ranks, each with 2 threads: Adam's 28 bytes, 8 for clipping, 6 for rounding; then 6 over the link."""
    wanted = replace(config(), cluster=replace(config().cluster, device="cuda"))
    wanted = replace(wanted, model=replace(wanted.model, dtype="bfloat16"))
    wanted = replace(wanted, learner=replace(wanted.learner, zero_stage=2, offload="optimizer", cpus=2))
    gpus = place(wanted, Machine(64, 8), "train")
    found = forecast(wanted, gpus, SHAPE, IDLE, LENGTHS, 0)
    share = SHAPE.parameters / 2
    assert found.train == pytest.approx(share * (42 / (2 * HOST_THREAD) + 6 / LINK))
    many = replace(gpus, learner_threads=64)
    assert forecast(wanted, many, SHAPE, IDLE, LENGTHS, 0).train == pytest.approx(
        share * (42 / (HOST_BANDWIDTH / 2) + 6 / LINK)
    ), "both ranks share one node's"


def test_a_critic_in_turn_adds_its_time_and_beside_only_what_it_takes_longer() -> None:
    grpo, ppo = of(config(), **speed(1e3)), of(config(name="ppo"), **speed(1e3))
    assert ppo.train == pytest.approx(grpo.train * (1 + 4 / 3))
    beside = replace(config(name="ppo"), critic=replace(Config().critic, side_by_side=True))
    assert of(beside, **speed(1e3)).train == pytest.approx(grpo.train * 4 / 3)


def test_scoring_that_takes_longer_than_sampling_is_said() -> None:
    """On a CPU it takes the same cores; on GPUs it goes on beside, and a second server halves it."""
    kl = replace(Config().algo.kl, coef=0.05)
    cpu = of(config(kl=kl), **speed(1e3))
    assert cpu.generate == pytest.approx(of(config(), **speed(1e3)).generate + cpu.score) and cpu.score > 0
    wanted = replace(config(kl=kl), cluster=replace(config().cluster, device="cuda"))
    gpus = place(wanted, Machine(64, 8), "train")
    one = forecast(wanted, gpus, SHAPE, replace(IDLE, **speed(1e3)), LENGTHS, 0)
    assert one.generate == one.score and one.bottleneck == "train"
    more = replace(wanted, scoring=replace(wanted.scoring, replicas=2))
    assert forecast(more, gpus, SHAPE, replace(IDLE, **speed(1e3)), LENGTHS, 0).score == pytest.approx(one.score / 2)
    slow = Forecast(generate=5.0, score=5.0, train=1.0, sync=0.0, at_once=False, lag=0, tokens=1.0)
    assert slow.bottleneck == "score"


def test_in_turn_a_step_is_the_sum_and_at_once_the_longer_side() -> None:
    size = 4 * SHAPE.parameters
    rates = {"decode_s": 0.1, "write": size / 1.0, "load": size / 2.0}
    in_turn, at_once = of(config(), **rates), of(config(lag=3), **rates)
    assert in_turn.sync == pytest.approx(3.0) and in_turn.step == pytest.approx(8.0)
    assert (in_turn.lag, in_turn.bottleneck) == (0, "generate")
    assert (in_turn.rollout_idle, in_turn.learner_idle) == (pytest.approx(3 / 8), pytest.approx(5 / 8))
    assert at_once.step == pytest.approx(5.0) and at_once.rollout_idle == pytest.approx(0) and at_once.lag == 1
    assert of(config(lag=3), load=size / 2.0).lag == 3, "rollout workers that wait have run ahead"
    shared = replace(config(lag=3), cluster=replace(config().cluster, colocate=True))
    same_threads = of(shared, **rates)
    assert not same_threads.at_once and same_threads.step == pytest.approx(8.0) and same_threads.lag == 1


def test_at_once_the_side_that_takes_longer_says_which_phase_is_the_longest() -> None:
    """The learner takes 12 s; none of its phases takes as long as sampling."""
    at_once = Forecast(generate=10.0, score=0.0, train=5.0, sync=7.0, at_once=True, lag=1, tokens=1.0)
    assert at_once.bottleneck == "push" and replace(at_once, at_once=False).bottleneck == "generate"
    assert replace(at_once, generate=13.0).bottleneck == "generate"
    assert replace(at_once, generate=13.0, score=13.0).bottleneck == "score"


def on_gpus(nodes: int = 1, **learner: Any) -> tuple[Config, Placement]:
    """4 ranks and 4 workers, on one node or half on each of two."""
    wanted = config(workers=4, ranks=4)
    wanted = replace(wanted, cluster=replace(wanted.cluster, device="cuda"))
    wanted = replace(wanted, learner=replace(wanted.learner, **learner))
    machines = [Machine(64, 8 if nodes == 1 else 3, f"10.0.0.{i}") for i in range(nodes)]
    return wanted, place_in(wanted, machines, "train")


def sent(wanted: Config, placement: Placement, link: float = NETWORK * 4) -> float:
    """Seconds of an update in which nothing but traffic takes time, in those of one gathering within a node."""
    whole = forecast(wanted, placement, SHAPE, replace(IDLE, link=link), LENGTHS, 0).train
    return whole / (4 * SHAPE.parameters * 3 / 4 / link)


@pytest.mark.parametrize(("stage", "expected"), [(0, 2), (1, 3), (2, 10 + 1), (3, 3 * 10)])
def test_ranks_send_each_other_weights_and_gradients(stage: int, expected: float) -> None:
    """A rank has 32 x 30 tokens, which are 10 micro-batches; across nodes the network is the slower link."""
    learner = {"zero_stage": stage, "micro_batch_tokens": 100}
    assert sent(*on_gpus(**learner)) == pytest.approx(expected)
    assert sent(*on_gpus(nodes=3, **learner)) == pytest.approx(4 * expected)
    cpu = replace(config(), learner=replace(config().learner, zero_stage=stage))
    assert of(cpu).train == pytest.approx(0.0), "how fast CPUs exchange is not known"


def test_old_logprobs_gather_once_more_and_only_where_they_are_computed() -> None:
    """Each of two updates has 5 micro-batches."""
    wanted, placement = on_gpus(zero_stage=3, micro_batch_tokens=100, updates_per_batch=2)
    assert sent(wanted, placement) == pytest.approx(3 * 10 + 10)
    behaviour = replace(wanted, algo=replace(wanted.algo, ratio_to="behaviour"))
    assert sent(behaviour, placement) == pytest.approx(3 * 10)
    two = replace(wanted, learner=replace(wanted.learner, zero_stage=2))
    assert sent(two, placement) == pytest.approx(10 + 2)


def test_ranks_that_share_sequences_have_micro_batches_together_and_exchange_heads() -> None:
    """Of 2 layers with 2 heads of queries and 1 of keys, 4 wide: in and out, half of each goes to the other rank."""
    wanted, placement = on_gpus(zero_stage=1)
    both = replace(wanted, learner=replace(wanted.learner, sequence_parallel=2))
    link = 4 * NETWORK
    heads = 3 * 32 * 30 * (4 * 2 * 2 * 4 * (2 + 1)) / 2 / link
    one = 4 * SHAPE.parameters * 3 / 4 / link
    assert sent(both, placement) == pytest.approx(3 + heads / one)
    three = replace(both, learner=replace(both.learner, zero_stage=3, micro_batch_tokens=200))
    assert sent(three, placement) == pytest.approx(3 * 10 + heads / one), "960 tokens a rank, 200 for two"


def test_engines_that_take_turns_sleep_and_wake_at_each_push() -> None:
    wanted, placement = on_gpus()
    apart = forecast(wanted, placement, SHAPE, IDLE, LENGTHS, 0)
    turns = replace(wanted, cluster=replace(wanted.cluster, colocate=True))
    found = forecast(turns, place(turns, Machine(64, 8), "train"), SHAPE, IDLE, LENGTHS, 0)
    assert found.sync - apart.sync == pytest.approx(2 * 4 * SHAPE.parameters / LINK)


def test_the_best_split_gives_the_slower_side_more() -> None:
    """Sampling takes 50 steps however few engines there are; learning falls with each rank."""
    wanted = config(workers=6, ranks=2)
    rates = replace(IDLE, decode_s=1e-4, **speed(1e4))
    found = splits(wanted, placed(wanted), [Machine(64, 0)], SHAPE, rates, LENGTHS, 0)
    assert [workers + ranks for _, workers, ranks in found] == [8] * 7
    step, _, ranks = found[0]
    assert ranks > 2 and step < forecast(wanted, placed(wanted), SHAPE, rates, LENGTHS, 0).step
    others = [
        forecast(one, placed(one), SHAPE, rates, LENGTHS, 0).step
        for one in (config(workers=8 - ranks, ranks=ranks) for ranks in range(1, 8))
    ]
    assert [step for step, *_ in found] == pytest.approx(sorted(others))


def test_a_gpu_is_faster_in_bfloat16_and_an_eager_engine_slower() -> None:
    h100 = KINDS["H100-80G"]
    assert gpu_rates(h100, "bfloat16", False).products > 10 * gpu_rates(h100, "float32", False).products
    assert gpu_rates(h100, "bfloat16", True).decode_layer_s > gpu_rates(h100, "bfloat16", False).decode_layer_s


def test_lengths_are_assumed_to_be_the_longest_without_a_word() -> None:
    assert assumed_lengths(config()) == Lengths(128, 128, 128)
    assert assumed_lengths(config(), 40) == Lengths(128, 40, 128)
    assert assumed_lengths(config(), 4000) == Lengths(128, 128, 128)
