"""One learner rank in a process of its own: `python ranks.py RANK WORLD PORT MODEL FOLDER`.

Trains a fixed batch of uneven rows on real DeepSpeed, under every ZeRO stage in turn, and leaves in FOLDER what the
tests compare: `WORLD-RANK.pt`, a dict of results by stage. Two ranks also run the methods of `plain_methods.py`; the
process that is alone runs them in plain torch, before it has seen DeepSpeed.
"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from altered_checkpoint import ALTERED, altered
from method_ranks import CHUNK_TOKENS, run_methods
from plain_methods import METHODS, run_plain
from sample_groups import PROMPT, group_of, rows_of

from rlhf_dist.algo.algorithm import LaggingMask
from rlhf_dist.algo.recipes import grpo
from rlhf_dist.config.schema import (
    AlgoConfig,
    CriticConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
)
from rlhf_dist.learner.checkpoint_files import MASK_FOLDER
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.mask_policy import MaskPolicy
from rlhf_dist.learner.micro_batch_rows import pack_rows
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.optimizer_state import held
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.rank_batch import rank_batch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import AS_THEY_ARE
from rlhf_dist.loop.batch import Batch
from rlhf_dist.loop.step import Learning, collate, make_shards
from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.rollout.trajectories import head_of
from rlhf_dist.types import NO_VERSION, Credit, Experience, Group, Sampling, Scores
from rlhf_dist.weights.shared_memory import WeightReader

SAMPLING = Sampling(temperature=0.9, top_p=1.0, top_k=0, max_tokens=40, stop=())
# eps 1 makes Adam's first step all but lr x gradient, so that equal weights mean equal gradients, small ones too.
OPTIMIZER = OptimizerConfig(lr=0.5, eps=1.0, warmup_steps=0, weight_decay=0.01, max_grad_norm=0.05)
LEARNER = LearnerConfig(optimizer=OPTIMIZER)
STEPS = 9
LAG = LaggingMask(top_p=0.5, every=2)
GRPO = grpo(AlgoConfig())


def rollouts(seed: int) -> list[Group]:
    """Four groups of three rows, 4 to 63 tokens long."""
    chance = np.random.default_rng(seed)
    made = []
    for group, prompt_length in enumerate((3, 20, 9, 14)):
        lengths = chance.integers(1, 40, size=3)
        made.append(
            group_of(
                chance.integers(0, 100, size=prompt_length),
                chance.integers(0, 100, size=int(lengths.sum())),
                lengths,
                prompt=replace(PROMPT, uid=f"0/{group}"),
                logprobs=-4.0,
            )
        )
    return made


def batch_of(made: list[Group]) -> tuple[Batch, Credit]:
    """The batch, with advantages of both signs."""
    scores = [np.arange(3, dtype=np.float32) for _ in made]
    none = np.zeros(3)
    batch = collate(
        [
            Experience(r.prompt, head_of(r), Scores(s, {}, none, none), r.request.key, None)
            for r, s in zip(made, scores, strict=True)
        ]
    )
    advantages = np.random.default_rng(0).normal(size=len(batch.groups)).astype(np.float32)
    return batch, Credit(advantages)


def cut(made: list[Group], learner: LearnerConfig, step: int, world: int) -> list[Shard]:
    """The shards of all ranks."""
    batch, credit = batch_of(made)
    learning = Learning(GRPO, learner, CriticConfig(), SAMPLING, STEPS)
    return make_shards(batch, batch.scores, credit, learning, 0.0, step, world)


def budget(world: int) -> int:
    """Micro-batch tokens that make 4 micro-batches on one rank and 2 on each of two."""
    for tokens in range(64, 1000):
        shards = cut(rollouts(1), replace(LEARNER, micro_batch_tokens=tokens), 1, world)
        if len(shards[0].updates[0]) == 4 // world:
            return tokens
    raise AssertionError("no budget cuts the batch so")


class Trainer:
    """A learner with its batches."""

    def __init__(
        self, model: Path, learner: LearnerConfig, dtype: str, world: int, checkpointing: bool = False
    ) -> None:
        self.config, self.world = learner, world
        self.engine = ModelEngine(
            model,
            ModelConfig(dtype=dtype, gradient_checkpointing=checkpointing),
            learner,
            OPTIMIZER,
            device="cpu",
            bucket_mib=1,  # type: ignore[arg-type]
        )
        self.learner = PolicyLearner(self.engine, GRPO)

    def step(self, step: int) -> dict[str, float]:
        made = rollouts(step)
        shard = cut(made, self.config, step, self.world)[self.engine.rank]
        return self.learner.update(rank_batch(shard, made, ()), None, AS_THEY_ARE).values()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.weights()}


def stepped(engine: ModelEngine) -> dict[str, torch.Tensor]:
    """What the optimizer holds on this rank, by name."""
    return {
        f"{run.name}.{key}": (value.view(-1)[run.start : run.start + run.count] if value.dim() else value).clone()
        for part in engine._deepspeed.parts()
        for key, value in held(part, engine._deepspeed.optimizer).items()
        for run in part.runs
    }


def chunks(shard: Shard, made: list[Group]) -> list[int]:
    """How many parts of `CHUNK_TOKENS` or less the sampled tokens of each micro-batch make."""
    batch = rank_batch(shard, made, ())
    counts = [len(batch.places(chosen)) for update in batch.updates for chosen in update]
    return [-(-count // CHUNK_TOKENS) for count in counts]


def run_stage(stage: int, world: int, model: Path, folder: Path) -> dict[str, Any]:
    """Three steps, a publication and a restored checkpoint under one ZeRO stage."""
    learner = replace(LEARNER, zero_stage=stage, ranks=world, micro_batch_tokens=budget(world))
    trainer = Trainer(model, learner, "float32", world)
    parameters = trainer.engine._deepspeed._engine.module.parameters()
    found: dict[str, Any] = {"start": trainer.weights(), "partitioned": sum(p.numel() == 0 for p in parameters)}
    found["norm"] = trainer.step(1)["learner/grad_norm"]
    found["one"] = trainer.weights()
    trainer.step(2)
    found["two"] = trainer.weights()
    announcement = trainer.engine.publish(2)
    if announcement is not None:
        with closing(WeightReader().take(announcement)) as lease:
            found["published"] = {name: tensor.clone() for name, tensor in lease.tensors()}
    # Without a step in between, on every rank.
    found["number alone"] = trainer.engine.publish(3) == (announcement and replace(announcement, version=3))
    checkpoint = folder / f"checkpoint-{world}-{stage}"
    checkpoint.mkdir(exist_ok=True)
    trainer.engine.save(checkpoint)
    torch.distributed.barrier()
    trainer.step(3)
    found["three"] = trainer.weights()
    third = trainer.engine.publish(4)
    if announcement is not None and third is not None:
        found["other buffer"] = third.offset != announcement.offset and third.hashes != announcement.hashes
    trainer.engine.close()
    again = Trainer(checkpoint / "hf", learner, "float32", world)
    if world == 2:
        found["altered"] = {kind: altered(again.engine, kind, checkpoint, folder) for kind in ALTERED}
    again.engine.restore(checkpoint)
    again.step(3)
    found["three_restored"] = again.weights()
    fresh = Trainer(checkpoint / "hf", learner, "float32", world)
    fresh.step(3)
    found["three_without_restore"] = fresh.weights()
    return found


def run_masked(stage: int, world: int, model: Path, folder: Path) -> dict[str, Any]:
    """A step under a mask that follows every second version: weights, and the logprobs that it leaves, by version."""
    learner = replace(
        LEARNER,
        zero_stage=stage,
        ranks=world,
        micro_batch_tokens=budget(world),
        logprob_chunk_tokens=CHUNK_TOKENS,
    )
    mask = MaskPolicy(model, ModelConfig(), LAG, device="cpu")
    engine = ModelEngine(model, ModelConfig(), learner, OPTIMIZER, device="cpu", bucket_mib=1, mask=mask)
    trainer = PolicyLearner(engine, GRPO)
    made = rollouts(1)
    packed = pack_rows(rows_of(made[0]), torch.device("cpu"))
    found: dict[str, Any] = {}
    for version in (0, 1, 2):
        engine.publish(version)
        found[f"weights {version}"] = {name: tensor.clone() for name, tensor in engine.weights()}
        found[f"masked {version}"] = engine.logprobs(packed, 1.0).detach().clone()
        found[f"plain {version}"] = engine.logprobs(packed, 1.0, masked=False).detach().clone()
        shard = cut(made, learner, version + 1, world)[engine.rank]
        trainer.update(rank_batch(shard, made, ()), None, AS_THEY_ARE)
        found["chunks"] = chunks(shard, made)
    target = folder / f"masked-{world}-{stage}"
    target.mkdir(exist_ok=True)
    engine.save(target)
    torch.distributed.barrier()
    found["saved"] = dict(load_model(target / MASK_FOLDER, "float32", "eager").named_parameters())
    engine.close()
    return found


def plain_masked(model: Path) -> dict[str, Any]:
    """The same by hand, one response at a time: the weights of versions 1 and 2, both under the mask of version 0."""
    policy, lagging = (load_model(model, "float32", "eager").requires_grad_(learns) for learns in (True, False))
    optimizer = adamw(policy)
    made = rollouts(1)
    batch, credit = batch_of(made)
    found: dict[str, Any] = {}
    for version in (1, 2):
        optimizer.zero_grad()
        for g, s, advantage in zip(batch.groups, batch.samples, credit.advantages, strict=True):
            row = rows_of(made[g])[s]
            tokens, where = torch.from_numpy(row.tokens.astype(np.int64)), slice(-row.length - 1, -1)
            own, other = (side(tokens[None], use_cache=False).logits[0, where] / 0.9 for side in (policy, lagging))
            p = other.softmax(-1)
            # [R, V]: what all likelier tokens have together. Those with too much before them are out.
            before = torch.where(p[:, None] > p[..., None], p[:, None], 0.0).sum(-1)
            drawn = (torch.arange(len(own)), tokens[-row.length :])
            outside = before >= LAG.top_p
            outside[drawn] = False
            loss = -advantage * own.masked_fill(outside, -torch.inf).log_softmax(-1)[drawn].sum()
            (loss / int(batch.lengths.sum())).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.max_grad_norm)
        optimizer.step()
        found[f"weights {version}"] = {name: tensor.detach().clone() for name, tensor in policy.named_parameters()}
    return found


def run_tight(stage: int, world: int, model: Path) -> dict[str, torch.Tensor]:
    """The weights after a step with a budget that most rows are longer than, and chunks shorter than it."""
    learner = replace(LEARNER, zero_stage=stage, ranks=world, micro_batch_tokens=16, logprob_chunk_tokens=CHUNK_TOKENS)
    trainer = Trainer(model, learner, "float32", world)
    trainer.step(1)
    return trainer.weights()


def run_checkpointed(stage: int, world: int, model: Path) -> dict[str, torch.Tensor]:
    """The weights after a step with gradient checkpointing."""
    learner = replace(LEARNER, zero_stage=stage, ranks=world, micro_batch_tokens=budget(world))
    trainer = Trainer(model, learner, "float32", world, checkpointing=True)
    trainer.step(1)
    return trainer.weights()


def run_bfloat16(stage: int, world: int, model: Path, folder: Path) -> dict[str, Any]:
    """Two steps in bf16, and what they left, restored: as it is, and with a weight that rounds to another one."""
    learner = replace(LEARNER, zero_stage=stage, ranks=world, micro_batch_tokens=budget(world))
    trainer = Trainer(model, learner, "bfloat16", world)
    before = trainer.weights()
    metrics = [trainer.step(1), trainer.step(2)]
    tensors = stepped(trainer.engine)
    checkpoint = folder / f"bfloat16-{world}-{stage}"
    checkpoint.mkdir(exist_ok=True)
    trainer.engine.save(checkpoint)
    torch.distributed.barrier()
    again = Trainer(checkpoint / "hf", learner, "bfloat16", world)
    refused = altered(again.engine, "weights", checkpoint, folder)
    again.engine.restore(checkpoint)
    masters = stepped(again.engine)
    return {
        "altered": refused,
        "restored": all(torch.equal(masters[name], tensor) for name, tensor in tensors.items()),
        "losses": [values["policy/loss"] for values in metrics],
        "start": before,
        "two": trainer.weights(),
        "optimizer": {name: str(tensor.dtype) for name, tensor in tensors.items()},
    }


def run_stale(stage: int, world: int, model: Path) -> dict[str, Any]:
    """The sentinel after a step, on rows that the weights before it sampled, in part or altogether.

    The last rows of all groups are of the present weights, but for 0.01 that one of their tokens is off.
    """
    learner = replace(LEARNER, zero_stage=stage, ranks=world, micro_batch_tokens=budget(world))
    trainer = Trainer(model, learner, "float32", world)
    made = rollouts(2)

    def logprobs(group: Group) -> np.ndarray:
        with torch.no_grad():
            found = trainer.engine.logprobs(pack_rows(rows_of(group), torch.device("cpu")), SAMPLING.temperature)
        return found.numpy()

    before = [logprobs(group) for group in made]
    trainer.step(1)
    after = [logprobs(group) for group in made]
    after[0][-1] += 0.01
    found: dict[str, Any] = {"moved": [np.abs(x - y) for x, y in zip(before, after, strict=True)]}
    for name, fresh in (("mixed", 1), ("stale", 0)):
        groups = [sampled_by(*of_group, fresh) for of_group in zip(made, before, after, strict=True)]
        shard = cut(groups, learner, 2, world)[trainer.engine.rank]
        found[name] = trainer.learner.update(rank_batch(shard, groups, ()), None, AS_THEY_ARE)
    return found


def sampled_by(group: Group, before: np.ndarray, after: np.ndarray, fresh: int) -> Group:
    """The group with its last `fresh` samples from version 1, whose logprobs are `after`; the others from version 0."""
    samples, stale = [], len(group.trajectories) - fresh
    for i, sample in enumerate(group.trajectories):
        values, version = (group.sampled(before)[i], 0) if i < stale else (group.sampled(after)[i], 1)
        per_token = np.zeros(len(sample.tokens), np.float32)
        per_token[sample.loss_mask] = values
        of_token = np.where(sample.loss_mask, version, NO_VERSION).astype(np.int32)
        samples.append(replace(sample, logprobs=per_token, versions=of_token, cache_versions=of_token))
    return replace(group, trajectories=tuple(samples))


def adamw(module: torch.nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(), lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps,
        weight_decay=OPTIMIZER.weight_decay,
    )  # fmt: skip


def plain(model: Path) -> dict[str, Any]:
    """The same steps in plain torch: one rank, one micro-batch, AdamW."""
    policy = PackedPolicy(load_model(model, "float32", "segmented"))
    optimizer = adamw(policy)
    found: dict[str, Any] = {}
    for step, name in ((1, "one"), (2, "two"), (3, "three")):
        made = rollouts(step)
        batch, credit = batch_of(made)
        rows = [rows_of(made[g])[s] for g, s in zip(batch.groups, batch.samples, strict=True)]
        packed = pack_rows(rows, torch.device("cpu"))
        logprobs, _ = policy(packed.tokens, packed.cu_seqlens, packed.predict, packed.targets, 0.9, 1024)
        # On policy the ratio is 1, so the clipped loss's gradient is that of -advantage x logprob.
        loss = -(logprobs * packed.spread(credit.advantages)).sum() / batch.lengths.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(policy.parameters(), OPTIMIZER.max_grad_norm))
        found.setdefault("norm", norm)
        optimizer.step()
        found[name] = {key.removeprefix("model."): value.detach().clone() for key, value in policy.named_parameters()}
    return found


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    model, folder = Path(sys.argv[4]), Path(sys.argv[5])
    found: dict[Any, Any] = {}
    if world == 1:
        found["methods"] = {name: run_plain(model, method) for name, method in METHODS.items()}
        assert "deepspeed" not in sys.modules, "plain torch"
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    found |= {stage: run_stage(stage, world, model, folder) for stage in (0, 1, 2, 3)}
    if world == 1:
        found["plain"] = plain(model)
        found["masked"] = plain_masked(model)
    else:
        found["methods"] = {stage: run_methods(model, stage) for stage in (2, 3)}
        found["tight"] = run_tight(3, world, model)
        found["checkpointed"] = {stage: run_checkpointed(stage, world, model) for stage in (2, 3)}
        found["stale"] = {stage: run_stale(stage, world, model) for stage in (2, 3)}
        found["masked"] = {stage: run_masked(stage, world, model, folder) for stage in (2, 3)}
        found["bfloat16"] = {}
        for stage in (0, 1, 2, 3):
            try:
                found["bfloat16"][stage] = run_bfloat16(stage, world, model, folder)
            except Exception as error:
                found["bfloat16"][stage] = repr(error)
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
