"""One rank of a critic and of a shared trunk, in a process of its own: `python critic_ranks.py RANK WORLD PORT FOLDER`.

FOLDER holds `critic`, a scalar model, and `shared/hf` with `shared/value_head.safetensors`. Real DeepSpeed under ZeRO
0, 2 and 3, with two passes of two mini-batches; leaves `WORLD-RANK.pt`, what the tests compare.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from method_ranks import CHUNK_TOKENS
from ranks import batch_of, chunks, rollouts
from sample_groups import flat_logprobs, flat_tokens, rows_of
from torch import Tensor

from rlhf_dist.algo.advantages import gae
from rlhf_dist.algo.algorithm import Algorithm
from rlhf_dist.algo.recipes import nlpo, ppo
from rlhf_dist.config.schema import (
    AlgoConfig,
    CriticConfig,
    KLConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    PtxConfig,
)
from rlhf_dist.data.rows import Demonstration
from rlhf_dist.learner.critic import CriticLearner
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.mask_policy import MaskPolicy
from rlhf_dist.learner.micro_batch_rows import Row, pack_rows
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.ptx import PtxMix
from rlhf_dist.learner.rank_batch import rank_batch
from rlhf_dist.learner.scalar_engine import ScalarEngine
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.shared_engine import SharedEngine
from rlhf_dist.learner.shared_trunk import SharedPolicyLearner
from rlhf_dist.learner.token_sums import Estimate, EstimateSums
from rlhf_dist.loop.step import Learning, assign_credit, make_shards
from rlhf_dist.models.actor_critic import PackedActorCritic
from rlhf_dist.models.hf import load_model, load_tokenizer
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.models.scalar import PackedScalar, load_scalar
from rlhf_dist.models.tensors import read_tensors
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Group, Sampling

STAGES = (0, 2, 3)
SAMPLING = Sampling(temperature=0.9, top_p=1.0, top_k=0, max_tokens=40, stop=())
# eps 1 makes Adam's step all but lr x gradient, so that equal weights mean equal gradients, small ones too.
OPTIMIZER = OptimizerConfig(lr=0.5, eps=1.0, warmup_steps=0, weight_decay=0.01, max_grad_norm=0.5)
LEARNER = LearnerConfig(optimizer=OPTIMIZER, epochs=2, updates_per_batch=2, logprob_chunk_tokens=CHUNK_TOKENS)
# Bounds that are met after one optimizer step.
CRITIC = CriticConfig(clip=0.01, coef=0.5, optimizer=OPTIMIZER)
APART = AlgoConfig(name="ppo", kl=KLConfig(coef=0.1))
SHARED = AlgoConfig(
    name="ppo", clip_low=0.01, clip_high=0.01, entropy_coef=0.05, kl=KLConfig(place="loss", coef=0.2, estimator="k3")
)
MASKED = replace(SHARED, name="nlpo", mask_top_p=0.5, mask_every=2)
PTX = PtxConfig(coef=0.3, batch_size=3, max_tokens=16)
TEXTS = [Demonstration((), text) for text in ("abc", "hello there", "a", "too long to be learnt from", "xyz xyz")]
HALVES = ((0, 1), (2, 3))
"""Groups of the two mini-batches."""
CPU = torch.device("cpu")


def references(made: Sequence[Group], seed: int) -> list[np.ndarray]:
    chance = np.random.default_rng(seed + 100)
    return [(-4.5 + 0.5 * chance.normal(size=len(flat_tokens(r)))).astype(np.float32) for r in made]


def cut(made: list[Group], algorithm: Algorithm, learner: LearnerConfig, kl_coef: float, world: int) -> list[Shard]:
    """The shards of all ranks."""
    batch, _ = batch_of(made)
    learning = Learning(algorithm, learner, CRITIC, SAMPLING, 100)
    credit = assign_credit(batch, batch.scores, algorithm, 0.0)
    return make_shards(batch, batch.scores, credit, learning, kl_coef, 1, world)


def budget(world: int) -> int:
    """Micro-batch tokens that make 4 micro-batches of each mini-batch on one rank and 2 on each of two."""
    for tokens in range(64, 1000):
        learner = replace(LEARNER, micro_batch_tokens=tokens)
        updates = cut(rollouts(1), ppo(APART), learner, 0.0, world)[0].updates
        if [len(micro_batches) for micro_batches in updates] == [4 // world] * 2:
            return tokens
    raise AssertionError("no budget cuts the batch so")


def merged(sums: EstimateSums) -> EstimateSums:
    """Over all ranks, as the controller does it."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, sums)
    return EstimateSums.merge(found)


def by_sample(shard: Shard, estimate: Estimate, made: Sequence[Group]) -> dict[tuple[int, int], Tensor]:
    """(group, sample) -> advantages, returns, values [3, N]."""
    lengths = rank_batch(shard, made, ()).lengths
    table = np.stack([estimate.advantages, estimate.returns, estimate.values])
    parts = np.split(table, np.cumsum(lengths)[:-1], axis=1)
    return {
        (int(g), int(s)): torch.from_numpy(part) for g, s, part in zip(shard.groups, shard.samples, parts, strict=True)
    }


class Trainer:
    """A critic with its own trunk."""

    def __init__(self, source: Path, stage: int, world: int) -> None:
        self.world = world
        self.config = replace(LEARNER, zero_stage=stage, ranks=world, micro_batch_tokens=budget(world))
        self.make(source)

    def make(self, source: Path) -> None:
        self.engine: Any = ScalarEngine(source, ModelConfig(), self.config, OPTIMIZER, device="cpu")
        self.learner: Any = CriticLearner(self.engine, ppo(APART), CRITIC, kl_in_reward=True)

    def step(self, step: int) -> dict[str, Any]:
        made = rollouts(step)
        shard = cut(made, ppo(APART), self.config, 0.1, self.world)[self.engine.rank]
        batch = rank_batch(shard, made, references(made, step))
        sums, estimate = self.learner.estimate(batch)
        metrics = self.learner.update(batch, estimate)
        return {"estimate": by_sample(shard, estimate, made), "sums": merged(sums), "metrics": metrics}

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine._deepspeed.named_weights()}


class SharedTrainer(Trainer):
    """Policy and critic on one trunk, with everything that can stand in the loss."""

    algorithm = ppo(SHARED)

    def make(self, source: Path) -> None:
        mask = self.algorithm.mask and MaskPolicy(source, ModelConfig(), self.algorithm.mask, device="cpu")
        self.engine = shared_engine(source, self.config, resumed=source.parent, mask=mask)
        ptx = mix(source, self.engine.rank, self.world)
        self.learner = SharedPolicyLearner(self.engine, self.algorithm, ptx, CRITIC, kl_in_reward=False)

    def step(self, step: int) -> dict[str, Any]:
        made = rollouts(step)
        shard = cut(made, self.algorithm, self.config, 0.2, self.world)[self.engine.rank]
        batch = rank_batch(shard, made, references(made, step))
        sums, estimate = self.learner.estimate(batch)
        sums = merged(sums)
        metrics = self.learner.update(batch, estimate, sums.whitening())
        found = {"estimate": by_sample(shard, estimate, made), "sums": sums, "metrics": metrics}
        return found | {"chunks": chunks(shard, made)}


class MaskedTrainer(SharedTrainer):
    """The same under a mask: NLPO."""

    algorithm = nlpo(MASKED)


def shared_engine(
    source: Path, learner: LearnerConfig, resumed: Path | None, mask: MaskPolicy | None = None
) -> SharedEngine:
    return SharedEngine(
        source, ModelConfig(), learner, OPTIMIZER, device="cpu", bucket_mib=1, resumed=resumed, mask=mask
    )


def head_of_another_run(source: Path, learner: LearnerConfig) -> dict[str, Tensor]:
    """The value head of a new run that starts from the policy in another run's checkpoint."""
    weights = shared_engine(source, learner, resumed=None)._deepspeed.named_weights()
    return {name: tensor.clone() for name, tensor in weights if name.startswith("value_head.")}


def mix(source: Path, rank: int, world: int) -> PtxMix:
    tokenizer = load_tokenizer(source)
    return PtxMix(PTX, TEXTS, tokenizer, chat=True, seed=0, share=rank, shares=world, micro_batch_tokens=18)


def run(kind: type[Trainer], source: Path, stage: int, world: int, folder: Path) -> dict[str, Any]:
    """Two steps, a publication, and the second step once more from a checkpoint."""
    trainer = kind(source, stage, world)
    parameters = trainer.engine._deepspeed._engine.module.parameters()
    found: dict[str, Any] = {"start": trainer.weights(), "partitioned": sum(p.numel() == 0 for p in parameters)}
    found["first"] = trainer.step(1)
    found["one"] = trainer.weights()
    if kind is SharedTrainer:
        announcement = trainer.engine.publish(1)
        found["published"] = None if announcement is None else announcement.plan.names
    checkpoint = folder / f"{kind.__name__}-{world}-{stage}"
    checkpoint.mkdir(exist_ok=True)
    trainer.engine.save(checkpoint)
    torch.distributed.barrier()
    trainer.step(2)
    found["two"] = trainer.weights()
    trainer.engine.close()
    again = kind(checkpoint / "hf", stage, world)
    again.engine.restore(checkpoint)
    found["one_restored"] = again.weights()
    again.step(2)
    found["two_restored"] = again.weights()
    if kind is SharedTrainer:
        found["of_another_run"] = head_of_another_run(checkpoint / "hf", trainer.config)
    return found


def run_masked(source: Path, world: int) -> dict[str, Any]:
    """A step under a mask, by two ranks under ZeRO 3."""
    trainer = MaskedTrainer(source, 3 if world == 2 else 0, world)
    return {"start": trainer.weights(), "first": trainer.step(1), "one": trainer.weights()}


class Recording(PolicyLearner):
    """Notes each optimizer step's approximate KL on this rank: (sum, tokens)."""

    def __init__(self, *words: Any) -> None:
        super().__init__(*words)
        self.seen: list[tuple[float, float]] = []

    def _too_far(self, measured: Sequence[MetricSums]) -> bool:
        self.seen.append(MetricSums.merge(measured).sums.get("policy/approx_kl", (0.0, 0.0)))
        return super()._too_far(measured)


def run_stop(source: Path, world: int, folder: Path) -> dict[str, Any]:
    """Three passes without a limit; then again with one that the KL passes for the first time in a later update."""

    def trained(kl_stop: float) -> tuple[list[tuple[float, float]], float]:
        trainer = SharedTrainer(source, 2, world)
        algorithm = replace(ppo(replace(SHARED, kl_stop=kl_stop)), entropy_coef=0.0)
        config = replace(trainer.config, epochs=3)
        made = rollouts(1)
        shard = cut(made, algorithm, config, 0.2, world)[trainer.engine.rank]
        batch = rank_batch(shard, made, references(made, 1))
        sums, estimate = trainer.learner.estimate(batch)
        learner = Recording(trainer.engine, algorithm)
        metrics = learner.update(batch, estimate, merged(sums).whitening())
        return learner.seen, metrics.values()["learner/updates"]

    seen, updates = trained(1e9)
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, seen)
    kl = [sum(s for s, _ in step) / sum(n for _, n in step) for step in zip(*everyone, strict=True)]
    stop = next(i for i in range(2, len(kl)) if kl[i] > max(kl[:i]))
    limit = max(kl[stop] * 0.999, 0.5 * (kl[stop] + max(kl[:stop])))
    alone = [own[stop][0] / own[stop][1] > limit for own in everyone]
    return {"all": updates, "expected": stop + 1, "alone": alone, "made": trained(limit)[1]}


def all_rows(made: Sequence[Group], groups: Sequence[int]) -> list[Row]:
    return [row for g in groups for row in rows_of(made[g])]


def flat_estimate(made: Sequence[Group], values: Tensor, given: Sequence[np.ndarray], kl_coef: float) -> Estimate:
    """Advantages and returns of all rows in order, row by row with `gae` alone."""
    scores, advantages, returns = batch_of(list(made))[0].scores, [], []
    lengths = [row.length for row in all_rows(made, range(4))]
    log_ratio = torch.from_numpy(np.concatenate([flat_logprobs(r) for r in made]) - np.concatenate(given))
    for v, ratio, score in zip(values.split(lengths), log_ratio.split(lengths), scores, strict=True):
        rewards = -kl_coef * ratio
        rewards[-1] += float(score)
        a, r = gae(rewards[None], v[None], torch.ones(1, len(v)), 1.0, 0.95)
        advantages.append(a[0])
        returns.append(r[0])
    return Estimate(torch.cat(advantages).numpy(), torch.cat(returns).numpy(), values.numpy())


def adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )  # fmt: skip


def updated(module: torch.nn.Module, optimizer: torch.optim.AdamW, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIMIZER.max_grad_norm)
    optimizer.step()


def value_loss(values: Tensor, old: Tensor, returns: Tensor) -> Tensor:
    near = old + (values - old).clamp(-CRITIC.clip, CRITIC.clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def mini_batches(made: Sequence[Group]) -> Iterator[tuple[list[Row], slice]]:
    """Two passes over two halves: rows, and where their tokens are among all."""
    middle = sum(len(flat_tokens(r)) for r in made[:2])
    for _ in range(2):
        for groups, part in zip(HALVES, (slice(0, middle), slice(middle, None)), strict=True):
            yield all_rows(made, groups), part


def plain_critic(source: Path) -> dict[str, Any]:
    """The same in plain torch: one forward pass a mini-batch, AdamW."""
    scalar = PackedScalar(load_scalar(source, "float32", "segmented"))
    optimizer, found = adamw(scalar), {}
    for step, name in ((1, "one"), (2, "two")):
        made = rollouts(step)

        def values_of(rows: list[Row]) -> Tensor:
            packed = pack_rows(rows, CPU)
            return scalar(packed.tokens, packed.cu_seqlens, packed.predict)

        with torch.no_grad():
            old = values_of(all_rows(made, range(4)))
        made_of = flat_estimate(made, old, references(made, step), 0.1)
        returns = torch.from_numpy(made_of.returns)
        for rows, part in mini_batches(made):
            updated(scalar, optimizer, value_loss(values_of(rows), old[part], returns[part]).mean())
        found[name] = {key: value.detach().clone() for key, value in scalar.named_parameters()}
        found[f"estimate_{name}"] = made_of
    return found


def plain_shared(source: Path, masked: bool = False) -> dict[str, Any]:
    """The same in plain torch, every term of the loss written out; one step where masked."""
    lagging = PackedPolicy(load_model(source, "float32", "segmented"))
    both = PackedActorCritic(load_model(source, "float32", "segmented"))
    both.value_head.load_state_dict(read_tensors(source.parent / "value_head.safetensors"))
    optimizer, found, number, ptx = adamw(both), {}, 0, mix(source, 0, 1)

    def forward(rows: Sequence[Row], temperature: float, masked: bool = masked) -> tuple[Tensor, Tensor, Tensor]:
        packed = pack_rows(rows, CPU)
        where = packed.tokens, packed.cu_seqlens, packed.predict
        mask = lagging.action_mask(*where, MASKED.mask_top_p) if masked else None
        return both(*where, packed.targets, temperature, 1024, "gradient", mask)

    for step, name in ((1, "one"),) if masked else ((1, "one"), (2, "two")):
        made = rollouts(step)
        given = references(made, step)
        reference = torch.from_numpy(np.concatenate(given))
        with torch.no_grad():
            before, _, old = forward(all_rows(made, range(4)), 0.9)
        credit = flat_estimate(made, old, given, 0.0)
        a, returns = torch.from_numpy(credit.advantages), torch.from_numpy(credit.returns)
        a = (a - a.mean()) / (a.var(unbiased=False) + 1e-8).sqrt()
        for rows, part in mini_batches(made):
            logprobs, entropy, values = forward(rows, 0.9)
            ratio = (logprobs - before[part]).exp()
            losses = -torch.minimum(ratio * a[part], ratio.clamp(0.99, 1.01) * a[part])
            apart = logprobs - reference[part]
            losses = losses + 0.2 * ((-apart).exp() - 1 + apart) - 0.05 * entropy
            losses = losses + 0.5 * value_loss(values, old[part], returns[part])
            text = [row for batch in ptx.batch(number).micro_batches for row in batch]
            updated(both, optimizer, losses.mean() - 0.3 * forward(text, 1.0, masked=False)[0].mean())
            number += 1
        # make_shards is told step 1 each time: the mix begins again with every step.
        number = 0
        found[name] = {key: value.detach().clone() for key, value in both.named_parameters()}
    return found


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    folder = Path(sys.argv[4])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    critic, shared = folder / "critic", folder / "shared" / "hf"
    found: dict[str, Any] = {
        "critic": {stage: run(Trainer, critic, stage, world, folder) for stage in STAGES},
        "shared": {stage: run(SharedTrainer, shared, stage, world, folder) for stage in STAGES},
        "masked": run_masked(shared, world),
        "stop": run_stop(shared, world, folder),
    }
    if world == 1:
        found["plain"] = {"critic": plain_critic(critic), "shared": plain_shared(shared)}
        found["plain"]["masked"] = plain_shared(shared, masked=True)
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
