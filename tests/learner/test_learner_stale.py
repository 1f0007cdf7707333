"""Rows that older weights sampled: gradients of both forms and the sentinel, by hand, on an engine of six numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.config.schema import AlgoConfig, CorrectionConfig
from rlhf_dist.learner.micro_batch_rows import Packed
from rlhf_dist.learner.policy_learner import PolicyLearner, compare
from rlhf_dist.learner.rank_batch import RankBatch
from rlhf_dist.learner.token_sums import AS_THEY_ARE, Estimate
from rlhf_dist.telemetry.histograms import RATIO_EDGES
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.telemetry.names import BEHAVIOUR_RATIOS, RATIOS as RATIOS_SEEN

CPU = torch.device("cpu")
RATIOS = np.array([1.1, 1.5, 0.5, 1.1, 1.5, 0.5])
"""Learner's probability of each token over that of the stale policy that sampled it: within the bounds 0.8 and 1.28 of
`CLIP`, above them, below them."""
ADVANTAGES = np.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
CLIP = AlgoConfig(clip_low=0.2, clip_high=0.28)
CLIPPED = [-2.2, 0.0, -1.0, 2.2, 3.0, 0.0]
"""Gradient of -min(r A, clip(r) A) by the logprob, where r itself is the smaller: -r A; where the clip is: 0.
A = 2:  min(2.2, 2.2) is r A; min(3, 2.56) is the clip; min(1, 1.6) is r A.
A = -2: min(-2.2, -2.2) is r A; min(-3, -2.56) is r A; min(-1, -1.6) is the clip."""


class NumbersEngine:
    """Token i has logprob log(0.3), whatever stands before it; a step adds `moves` to all of them."""

    device = CPU
    parts = 1

    def __init__(self, moves: float = 0.0, rank: int = 0) -> None:
        self.rank = rank
        self.table = torch.full((6,), math.log(0.3), requires_grad=True)
        self.moves = moves
        self.passes = 0
        self.entropies = 0
        self.gradients: list[list[float]] = []

    def logprobs(self, packed: Packed, temperature: float) -> Tensor:
        self.passes += 1
        return self.table[packed.targets]

    def logprobs_and_entropy(self, packed: Packed, temperature: float, gradient: bool) -> tuple[Tensor, Tensor]:
        self.entropies += 1
        return self.logprobs(packed, temperature), torch.zeros(len(packed.targets))

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        assert self.table.grad is not None
        self.gradients.append([round(x, 5) + 0.0 for x in self.table.grad.tolist()])
        self.table.grad = None
        with torch.no_grad():
            self.table += self.moves
        return 1.0


def stale(lengths: Sequence[int] = (1,) * 6, ratios: np.ndarray = RATIOS, epochs: int = 1) -> RankBatch:
    """Responses 0, 1 ... of these lengths to the prompt 5, one version old; the loss is the plain sum over tokens."""
    ends = np.cumsum([0, *lengths])
    tokens = np.concatenate([[5, *range(i, j)] for i, j in pairwise(ends)]).astype(np.int32)
    starts = ends + np.arange(len(ends))
    loss_mask = np.ones(len(tokens), bool)
    loss_mask[starts[:-1]] = False
    count = len(lengths)
    return RankBatch(
        advantages=ADVANTAGES[ends[:-1]].astype(np.float32),
        scores=np.zeros(count, np.float32),
        weights=np.ones(count),
        updates=((np.arange(count),),),
        epochs=epochs,
        first_update=0,
        learning_rates=(0.1,) * epochs,
        critic_rates=(),
        temperature=1.0,
        version=1,
        kl_coef=0.0,
        tokens=tokens,
        loss_mask=loss_mask,
        starts=starts,
        offsets=ends,
        sampled=(math.log(0.3) - np.log(ratios)).astype(np.float32),
        cache_versions=np.zeros(int(ends[-1]), np.int32),
        reference=np.empty(0, np.float32),
        origins=tuple(("train/0/0/0", i) for i in range(count)),
    )


def learnt(algo: AlgoConfig, batch: RankBatch, moves: float = 0.0) -> tuple[NumbersEngine, Mapping[str, float]]:
    made: Any = NumbersEngine(moves)
    by_token = np.repeat(batch.advantages, batch.lengths)
    algorithm = ALGORITHMS[algo.name](algo)
    estimate = Estimate(by_token, by_token, by_token) if algorithm.credit_by_token else None
    metrics = PolicyLearner(made, algorithm).update(batch, estimate, AS_THEY_ARE)
    return made, metrics.values()


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_ratio_to_the_sampler_is_clipped_by_how_stale_a_token_is(name: str) -> None:
    engine, metrics = learnt(replace(CLIP, name=name, ratio_to="behaviour"), stale())
    assert engine.gradients == [CLIPPED]
    assert metrics["policy/ratio"] == pytest.approx(RATIOS.mean()) and metrics["policy/ratio_max"] == pytest.approx(1.5)
    assert (metrics["policy/clipped_high"], metrics["policy/clipped_low"]) == pytest.approx((1 / 6, 1 / 6))


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_a_ratio_to_the_learner_before_the_update_is_1_and_corrects_nothing(name: str) -> None:
    engine, metrics = learnt(replace(CLIP, name=name), stale())
    assert engine.gradients == [[-2.0, -2.0, -2.0, 2.0, 2.0, 2.0]]
    assert metrics["policy/ratio"] == metrics["policy/ratio_max"] == 1.0


def test_ratios_are_counted_where_the_clip_sees_them_and_against_the_sampler() -> None:
    """6 tokens, none of their ratios on an edge; to the learner before the update all are 1."""
    ratios = RATIOS * 1.001
    engine: Any = NumbersEngine(0.0)
    found = PolicyLearner(engine, ALGORITHMS["grpo"](CLIP)).update(stale(ratios=ratios), None, AS_THEY_ARE)
    one = [0.0] * (len(RATIO_EDGES) - 1)
    one[RATIO_EDGES.index(0.995)] = 6.0
    expected, _ = np.histogram(ratios, RATIO_EDGES)
    assert found.buckets[RATIOS_SEEN] == tuple(one)
    assert found.buckets[BEHAVIOUR_RATIOS] == tuple(expected.tolist()) and sum(expected) == 6


def test_ranks_that_share_rows_count_each_ratio_once() -> None:
    counted: list[float] = []
    for rank in range(4):
        engine: Any = NumbersEngine(0.0, rank)
        engine.parts = 2
        found = PolicyLearner(engine, ALGORITHMS["grpo"](CLIP)).update(stale(), None, AS_THEY_ARE)
        assert found.values()["policy/ratio_max"] == 1.0, "a maximum may be told twice"
        counted.append(sum(map(sum, found.buckets.values())))
    assert counted == [12.0, 0.0, 12.0, 0.0], "6 tokens in each of 2 histograms"


@pytest.mark.parametrize("name", ["ppo", "grpo", "decoupled_ppo"])
@pytest.mark.parametrize(
    ("correction", "gradients"),
    [
        # -w A, w the ratio cut to 0 .. 1.25: 1.1, 1.25, 0.5.
        (CorrectionConfig("token", "truncate", 0.0, 1.25), [-2.2, -2.5, -1.0, 2.2, 2.5, 1.0]),
        # To 0.75 .. 2: 1.1, 1.5, 0.75.
        (CorrectionConfig("token", "truncate", 0.75, 2.0), [-2.2, -3.0, -1.5, 2.2, 3.0, 1.5]),
        # Within 0.75 .. 1.25 the ratio, else 0: 1.1, 0, 0.
        (CorrectionConfig("token", "mask", 0.75, 1.25), [-2.2, 0.0, 0.0, 2.2, 0.0, 0.0]),
    ],
)
def test_a_correction_weighs_by_how_stale_a_token_is(
    name: str, correction: CorrectionConfig, gradients: list[float]
) -> None:
    engine, metrics = learnt(replace(CLIP, name=name, correction=correction), stale())
    assert engine.gradients == [gradients]
    assert metrics["policy/ratio"] == 1.0, "the loss's own ratio is to the learner before the update"


def test_a_method_without_a_ratio_has_the_correction_alone() -> None:
    """RLOO's loss is -A logprob: gradient -w A."""
    correction = CorrectionConfig("token", "truncate", 0.0, 1.25)
    engine, _ = learnt(AlgoConfig(name="rloo", correction=correction), stale())
    assert engine.gradients == [[-2.2, -2.5, -1.0, 2.2, 2.5, 1.0]]
    assert learnt(AlgoConfig(name="rloo"), stale())[0].gradients == [[-2.0, -2.0, -2.0, 2.0, 2.0, 2.0]]


def test_cispo_weighs_by_the_cut_ratio_to_the_sampler() -> None:
    """-clip(r) A, no gradient is stopped: r cut to 0.8 .. 1.28 is 1.1, 1.28, 0.8."""
    engine, _ = learnt(replace(CLIP, name="cispo", ratio_to="behaviour"), stale())
    assert engine.gradients == [[-2.2, -2.56, -1.6, 2.2, 2.56, 1.6]]


def test_gspo_takes_the_ratio_of_a_whole_response_to_the_sampler() -> None:
    """Responses of three tokens, ratios 1.1 x 1.21 x 1 = 1.1^3 and 1.6 x 1.6 x 1 = 1.368^3: s is 1.1, and above 1.28.

    A = 2: -s A at each token. A = -2: the first form is the smaller, so s A has its gradient too; with A = 2 it is 0.
    """
    ratios = np.array([1.1, 1.21, 1.0, 1.6, 1.6, 1.0])
    algo = replace(CLIP, name="gspo", ratio_to="behaviour")
    engine, _ = learnt(algo, stale((3, 3), ratios))
    s = 2.56 ** (1 / 3)
    assert engine.gradients[0] == pytest.approx([-2.2] * 3 + [2 * s] * 3, abs=1e-4)
    both_good = replace(stale((3, 3), ratios), advantages=np.array([2.0, 2.0], np.float32))
    assert learnt(algo, both_good)[0].gradients[0] == pytest.approx([-2.2] * 3 + [0.0] * 3, abs=1e-4)


def test_a_second_pass_goes_on_from_the_sampler_and_needs_no_old_logprobs() -> None:
    """A step multiplies every probability by 1.2: ratios 1.32, 1.8, 0.6 to the sampler, 1.2 to the learner before.

    To the sampler, A = 2: above, above, -r A = -1.2; A = -2: r A = 2.64, 3.6, below. To the learner: -1.2 A.
    """
    moves = math.log(1.2)
    engine, _ = learnt(replace(CLIP, ratio_to="behaviour"), stale(epochs=2), moves)
    assert engine.gradients == [CLIPPED, [0.0, 0.0, -1.2, 2.64, 3.6, 0.0]]
    assert engine.passes == 2
    engine, _ = learnt(CLIP, stale(epochs=2), moves)
    assert engine.gradients == [[-2.0] * 3 + [2.0] * 3, [-2.4] * 3 + [2.4] * 3]
    assert engine.passes == 3, "two updates, and the logprobs before the first"
    assert engine.entropies == 2, "in an update entropy is a metric; before the first nobody wants it"


def test_one_update_of_stale_rows_needs_no_old_logprobs() -> None:
    """They are those of the update itself, whoever sampled."""
    assert learnt(CLIP, stale())[0].passes == 1


def test_the_early_stop_measures_what_the_ratio_is_taken_to() -> None:
    """k3 of the ratios 1.1, 1.5, 0.5, r - 1 - log r: 0.0047, 0.0945, 0.1931; their mean is 0.0974."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for ratio_to, limit, updates in (("behaviour", 0.09, 1), ("behaviour", 0.11, 2), ("proximal", 0.09, 2)):
            algo: Any = replace(CLIP, ratio_to=ratio_to, kl_stop=limit)
            engine, metrics = learnt(algo, stale(epochs=2))
            assert len(engine.gradients) == updates
            assert metrics["policy/approx_kl"] == pytest.approx(0.0974 if ratio_to == "behaviour" else 0.0, abs=1e-4)
    finally:
        torch.distributed.destroy_process_group()


def found(differences: Sequence[float], lags: Sequence[int]) -> MetricSums:
    return compare(torch.tensor(differences), torch.tensor(lags))


def test_the_sentinel_compares_tokens_of_the_learners_own_version() -> None:
    values = found([0.001, 0.5, 0.003, 0.7, 0.2], [0, 1, 0, 1, 3]).values()
    assert values == pytest.approx(
        {
            "rollout/logprob_diff_max": 0.003,
            "rollout/logprob_diff_mean": 0.002,
            "rollout/logprob_diff/lag_1": 0.6,
            "rollout/logprob_diff/lag_3": 0.2,
        }
    )


def test_parts_of_ranks_and_micro_batches_add_up_by_lag() -> None:
    parts = [found([0.1, 0.2], [0, 1]), found([0.4], [1]), found([0.3, 0.5, 0.6], [2, 1, 0])]
    assert MetricSums.merge(parts).values() == pytest.approx(
        {
            "rollout/logprob_diff_max": 0.6,
            "rollout/logprob_diff_mean": 0.35,
            "rollout/logprob_diff/lag_1": (0.2 + 0.4 + 0.5) / 3,
            "rollout/logprob_diff/lag_2": 0.3,
        }
    )


def test_without_a_token_of_its_own_version_nothing_is_compared() -> None:
    assert found([0.5, 0.7], [1, 1]).values() == pytest.approx({"rollout/logprob_diff/lag_1": 0.6})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("lag", [0, 1])
def test_a_difference_that_is_not_finite_shows_at_any_lag(value: float, lag: int) -> None:
    largest = found([0.1, value, 0.2], [0, lag, 1]).values()["rollout/logprob_diff_max"]
    assert not largest <= 1e9
