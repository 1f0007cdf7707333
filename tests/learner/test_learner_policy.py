"""The policy's update on plain torch in one process: what the gradient is, term by term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ranks import batch_of, rollouts
from sample_groups import flat_tokens, rows_of
from torch import Tensor

from rlhf_dist.algo.corrections import Level, Mode, importance_weights
from rlhf_dist.algo.logprobs import Entropy
from rlhf_dist.algo.recipes import ppo
from rlhf_dist.config.schema import AlgoConfig, CorrectionConfig, CriticConfig, KLConfig, LearnerConfig, OptimizerConfig
from rlhf_dist.learner.micro_batch_rows import Packed, Row, pack_batch, pack_rows
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.rank_batch import RankBatch, rank_batch
from rlhf_dist.learner.token_sums import AS_THEY_ARE, Estimate, Whitening
from rlhf_dist.loop.step import Learning, assign_credit, make_shards
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.types import Group, Sampling

CPU = torch.device("cpu")
SAMPLING = Sampling(temperature=0.9, top_p=1.0, top_k=0, max_tokens=40, stop=())
LEARNER = LearnerConfig(micro_batch_tokens=100, optimizer=OptimizerConfig(lr=1.0, warmup_steps=0))


class PlainEngine:
    """An engine without DeepSpeed: gradients add up, a step notes and drops them."""

    device, rank, parts = CPU, 0, 1

    def __init__(self, model: Path) -> None:
        self.policy = PackedPolicy(load_model(model, "float32", "segmented"))
        self.gradients: list[Tensor] = []

    def logprobs(self, packed: Packed, temperature: float) -> Tensor:
        return self._forward(packed, temperature, "none")[0]

    def logprobs_and_entropy(self, packed: Packed, temperature: float, gradient: bool = False) -> Any:
        return self._forward(packed, temperature, "gradient" if gradient else "value")

    def _forward(self, packed: Packed, temperature: float, entropy: Entropy) -> Any:
        return self.policy(packed.tokens, packed.cu_seqlens, packed.predict, packed.targets, temperature, 64, entropy)

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.policy.parameters() if p.grad is not None]))
        self.policy.zero_grad()
        return 1.0


def batch_for(
    made: list[Group],
    algo: AlgoConfig,
    learner: LearnerConfig = LEARNER,
    kl_coef: float = 0.0,
    references: Sequence[np.ndarray] = (),
) -> RankBatch:
    batch, _ = batch_of(made)
    learning = Learning(ppo(algo), learner, CriticConfig(), SAMPLING, 10)
    credit = assign_credit(batch, batch.scores, ppo(algo), 0.0)
    (shard,) = make_shards(batch, batch.scores, credit, learning, kl_coef, 1, 1)
    return rank_batch(shard, made, references)


def learnt(model: Path, algo: AlgoConfig, batch: RankBatch) -> tuple[PlainEngine, dict[str, float]]:
    engine: Any = PlainEngine(model)
    metrics = PolicyLearner(engine, ppo(algo)).update(batch, credit_of(batch), AS_THEY_ARE)
    return engine, metrics.values()


def credit_of(batch: RankBatch) -> Estimate:
    """An advantage of its own for every token."""
    advantages = np.random.default_rng(7).normal(size=len(batch.sampled)).astype(np.float32)
    return Estimate(advantages, advantages, advantages)


def whole(batch: RankBatch) -> Packed:
    """All rows in one."""
    return pack_batch(batch, np.arange(len(batch.lengths)), CPU)


def expected(engine: PlainEngine, batch: RankBatch, term: Any) -> Tensor:
    """The gradient of the mean over all tokens of term(logprobs, entropy)."""
    logprobs, entropy = engine.logprobs_and_entropy(whole(batch), 0.9, True)
    term(logprobs, entropy).mean().backward()
    engine.step(0.0)
    return engine.gradients.pop()


@pytest.fixture
def made() -> list[Group]:
    return rollouts(1)


def test_ppo_at_ratio_1_is_reinforce_with_the_same_advantages(tiny_model: Path, made: list[Group]) -> None:
    """-A grad log pi, token by token: at ratio 1 nothing is clipped."""
    algo = AlgoConfig(name="ppo", clip_low=0.01, clip_high=0.01)
    batch = batch_for(made, algo)
    engine, metrics = learnt(tiny_model, algo, batch)
    a = torch.from_numpy(credit_of(batch).advantages)
    reinforce = expected(engine, batch, lambda logprobs, _: -a * logprobs)
    assert reinforce.norm() > 1e-2
    torch.testing.assert_close(engine.gradients[0], reinforce, rtol=1e-4, atol=1e-6)
    assert metrics["policy/ratio"] == 1.0 and metrics["policy/clipped_low"] == metrics["policy/clipped_high"] == 0.0


def test_kl_and_entropy_stand_beside_it_in_the_loss(tiny_model: Path, made: list[Group]) -> None:
    algo = AlgoConfig(name="ppo", entropy_coef=0.3, kl=KLConfig(place="loss", coef=0.4, estimator="k2"))
    references = [np.linspace(-6, -3, len(flat_tokens(r))).astype(np.float32) for r in made]
    batch = batch_for(made, algo, kl_coef=0.4, references=references)
    engine, metrics = learnt(tiny_model, algo, batch)
    a = torch.from_numpy(credit_of(batch).advantages)
    by_sample = [found for group, values in zip(made, references, strict=True) for found in group.sampled(values)]
    order = [3 * group + sample for group, sample in order_of(batch, made)]
    reference = torch.from_numpy(np.concatenate([by_sample[i] for i in order]))

    def term(logprobs: Tensor, entropy: Tensor) -> Tensor:
        return -a * logprobs + 0.4 * 0.5 * (logprobs - reference).square() - 0.3 * entropy

    torch.testing.assert_close(engine.gradients[0], expected(engine, batch, term), rtol=1e-4, atol=1e-6)
    assert metrics["kl/loss"] > 0.1 and metrics["policy/entropy"] > 1.0


def order_of(batch: RankBatch, made: list[Group]) -> list[tuple[int, int]]:
    """(group, sample) of the batch's rows, by their tokens."""
    samples = {
        sample.tokens.tobytes(): (g, s) for g, group in enumerate(made) for s, sample in enumerate(group.trajectories)
    }
    return [samples[tokens.tobytes()] for tokens in np.split(batch.tokens, batch.starts[1:-1])]


@pytest.mark.parametrize(("level", "mode"), [("token", "mask"), ("geometric", "truncate")])
def test_a_correction_weighs_every_tokens_gradient(
    tiny_model: Path, made: list[Group], level: Level, mode: Mode
) -> None:
    algo = AlgoConfig(name="ppo", correction=CorrectionConfig(level, mode, 0.45, 1.5))
    batch = batch_for(made, algo)
    engine, metrics = learnt(tiny_model, algo, batch)
    a = torch.from_numpy(credit_of(batch).advantages)
    sampled, offsets = torch.full((len(batch.sampled),), -4.0), whole(batch).offsets

    def term(logprobs: Tensor, _: Tensor) -> Tensor:
        weight, _ = importance_weights(logprobs.detach(), sampled, level, mode, 0.45, 1.5, offsets)
        assert float((weight != 1).float().mean()) > 0.2
        return -weight * a * logprobs

    torch.testing.assert_close(engine.gradients[0], expected(engine, batch, term), rtol=1e-4, atol=1e-6)
    assert metrics["correction/weight"] != 1.0


def test_only_tokens_of_high_entropy_have_a_gradient(tiny_model: Path, made: list[Group]) -> None:
    algo = AlgoConfig(name="ppo", entropy_share=0.3)
    batch = batch_for(made, algo)
    # the learner gathers the entropies of all ranks.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        engine, _ = learnt(tiny_model, algo, batch)
    finally:
        torch.distributed.destroy_process_group()
    a = torch.from_numpy(credit_of(batch).advantages)

    def term(logprobs: Tensor, entropy: Tensor) -> Tensor:
        kept = entropy.detach() >= entropy.detach().topk(round(0.3 * len(entropy))).values[-1]
        assert 0.25 < float(kept.float().mean()) < 0.35
        return -(kept * a * logprobs)

    torch.testing.assert_close(engine.gradients[0], expected(engine, batch, term), rtol=1e-4, atol=1e-6)


def test_what_the_policy_has_left_has_no_gradient_where_it_was_bad(tiny_model: Path, made: list[Group]) -> None:
    """Advantages here are by token, so the tokens with negative ones of responses beyond the limit."""
    algo = AlgoConfig(name="ppo", off_policy_limit=0.6)
    batch = batch_for(made, algo)
    engine, metrics = learnt(tiny_model, algo, batch)
    a = torch.from_numpy(credit_of(batch).advantages)
    sampled, offsets = torch.full((len(batch.sampled),), -4.0), whole(batch).offsets

    def term(logprobs: Tensor, _: Tensor) -> Tensor:
        far = [float((sampled - logprobs.detach())[i:j].mean()) > 0.6 for i, j in pairwise(offsets.tolist())]
        left = torch.repeat_interleave(torch.tensor(far), offsets.diff()) & (a < 0)
        assert 0 < float(left.float().mean()) == pytest.approx(metrics["policy/off_policy_masked"])
        return -(~left * a * logprobs)

    torch.testing.assert_close(engine.gradients[0], expected(engine, batch, term), rtol=1e-4, atol=1e-6)


def test_the_coefficient_is_that_of_the_step(tiny_model: Path, made: list[Group]) -> None:
    """A controller may have moved it: the shard's counts, not the config's."""
    algo = AlgoConfig(name="ppo", kl=KLConfig(place="loss", coef=9.0))
    references = [np.full(len(flat_tokens(r)), -5.0, np.float32) for r in made]
    without, _ = learnt(tiny_model, AlgoConfig(name="ppo"), batch_for(made, algo))
    zero, _ = learnt(tiny_model, algo, batch_for(made, algo, kl_coef=0.0, references=references))
    some, _ = learnt(tiny_model, algo, batch_for(made, algo, kl_coef=0.5, references=references))
    torch.testing.assert_close(zero.gradients[0], without.gradients[0])
    assert (some.gradients[0] - without.gradients[0]).norm() > 1e-2


def test_whitened_and_cut_advantages_are_what_is_learnt(tiny_model: Path, made: list[Group]) -> None:
    algo = AlgoConfig(name="ppo", advantage_clip=0.5)
    batch, engine = batch_for(made, algo), PlainEngine(tiny_model)
    stand_in: Any = engine
    PolicyLearner(stand_in, ppo(algo)).update(batch, credit_of(batch), Whitening(0.2, 2.0))
    a = torch.from_numpy(((credit_of(batch).advantages - 0.2) / 2.0).clip(-0.5, 0.5))
    wanted = expected(engine, batch, lambda logprobs, _: -a * logprobs)
    torch.testing.assert_close(engine.gradients[0], wanted, rtol=1e-4, atol=1e-6)


def test_every_pass_takes_every_mini_batch(tiny_model: Path, made: list[Group]) -> None:
    """3 passes of 2: the old logprobs are those before the first, so without a step in between all passes agree."""
    algo = AlgoConfig(name="ppo")
    learner = replace(LEARNER, epochs=3, updates_per_batch=2)
    batch = batch_for(made, algo, learner)
    engine, metrics = learnt(tiny_model, algo, batch)
    assert metrics["learner/updates"] == 6 and len(engine.gradients) == 6
    for number in (2, 4):
        assert torch.equal(engine.gradients[number], engine.gradients[0])
        assert torch.equal(engine.gradients[number + 1], engine.gradients[1])
    assert not torch.allclose(engine.gradients[0], engine.gradients[1])


def test_the_sentinel_compares_the_samplers_logprobs_once(tiny_model: Path, made: list[Group]) -> None:
    algo = AlgoConfig(name="ppo")
    batch = batch_for(made, algo, replace(LEARNER, epochs=2))
    _, metrics = learnt(tiny_model, algo, batch)
    logprobs = PlainEngine(tiny_model).logprobs(whole(batch), 0.9)
    difference = (logprobs.detach() + 4.0).abs()  # the sampler's are all -4
    assert metrics["rollout/logprob_diff_max"] == pytest.approx(float(difference.max()), rel=1e-5)
    assert metrics["rollout/logprob_diff_mean"] == pytest.approx(float(difference.mean()), rel=1e-5)


class MaskedEngine(PlainEngine):
    """Under the mask of a policy that is far from the one that learns."""

    def __init__(self, model: Path) -> None:
        super().__init__(model)
        self.earlier = PackedPolicy(load_model(model, "float32", "segmented"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.earlier.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)

    def logprobs(self, packed: Packed, temperature: float, masked: bool = True) -> Tensor:
        return (self._forward if masked else super()._forward)(packed, temperature, "none")[0]

    def _forward(self, packed: Packed, temperature: float, entropy: Entropy) -> Any:
        where = (packed.tokens, packed.cu_seqlens, packed.predict)
        mask = self.earlier.action_mask(*where, top_p=0.5)
        return self.policy(*where, packed.targets, temperature, 64, entropy, mask)


class Texts:
    """A pre-training mix of one row."""

    coef = 0.5

    def __init__(self, row: Row) -> None:
        self.row = row

    def batch(self, number: int) -> Any:
        return SimpleNamespace(micro_batches=[[self.row]], tokens=self.row.length, dropped=0)


def test_pre_training_text_is_not_under_the_mask_and_responses_are(tiny_model: Path, made: list[Group]) -> None:
    algo = AlgoConfig(name="nlpo")
    batch, row = batch_for(made, algo), rows_of(made[1])[0]
    engine: Any = MaskedEngine(tiny_model)
    mix: Any = Texts(row)
    PolicyLearner(engine, ppo(algo), mix).update(batch, credit_of(batch), AS_THEY_ARE)
    a = torch.from_numpy(credit_of(batch).advantages)
    responses = expected(engine, batch, lambda logprobs, _: -a * logprobs)
    texts = []
    for masked in (False, True):
        logprobs = engine.logprobs(pack_rows([row], CPU), 1.0, masked=masked)
        (-0.5 * logprobs.mean()).backward()
        engine.step(0.0)
        texts.append(engine.gradients.pop())
    torch.testing.assert_close(engine.gradients[0], responses + texts[0], rtol=1e-4, atol=1e-6)
    assert (texts[0] - texts[1]).norm() > 1e-2, "the mask would have shown"
