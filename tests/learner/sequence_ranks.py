"""One rank that shares its rows with others: `python sequence_ranks.py RANK WORLD PORT MODEL CRITIC FOLDER`.

Trains fixed batches of uneven rows: alone, and as one of four ranks of which two or all four share each row. Leaves
`WORLD-RANK.pt`, what the tests compare.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ranks import OPTIMIZER, batch_of, rollouts
from sample_groups import rows_of

from rlhf_dist.algo.recipes import ALGORITHMS, ppo
from rlhf_dist.config.schema import AlgoConfig, CriticConfig, KLConfig, LearnerConfig, ModelConfig
from rlhf_dist.learner.critic import CriticLearner
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.micro_batch_rows import pack_rows
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.rank_batch import RankBatch, rank_batch
from rlhf_dist.learner.scalar_engine import ScalarEngine
from rlhf_dist.learner.supervised import batch_share
from rlhf_dist.learner.token_sums import AS_THEY_ARE, EstimateSums
from rlhf_dist.loop.step import Learning, make_shards
from rlhf_dist.types import Sampling

CHUNK_TOKENS = 16
"""Ranks need a different number of logprob chunks in the same pass."""
PPO = ppo(AlgoConfig(name="ppo", kl=KLConfig(coef=0.0)))
METHODS = {
    "grpo": AlgoConfig(name="grpo", entropy_coef=0.1, kl=KLConfig(coef=0.0)),
    "gspo": AlgoConfig(name="gspo", clip_low=1e-2, clip_high=1e-2, kl=KLConfig(coef=0.0)),
    "grpo, entropy": AlgoConfig(name="grpo", entropy_share=0.3, kl=KLConfig(coef=0.0)),
}
"""The second has a loss of whole responses, the last one of those tokens that all ranks together choose."""
CASES = {
    "grpo, zero 0": ("grpo", 0, "float32", False),
    "gspo, zero 3, checkpointed": ("gspo", 3, "float32", True),
    "grpo, zero 2, offloaded": ("grpo", 2, "float32", False),
    "gspo, zero 3, offloaded": ("gspo", 3, "float32", False),
    "grpo of high entropy, zero 1": ("grpo, entropy", 1, "float32", False),
    "grpo, zero 3, bfloat16": ("grpo", 3, "bfloat16", False),
}
"""Method, ZeRO stage, dtype, gradient checkpointing. Alone no optimizer is offloaded."""
WITH_FOUR = ("gspo, zero 3, checkpointed",)
"""Those that all four ranks do as one group, too."""


def learner_of(world: int, parts: int, stage: int) -> LearnerConfig:
    return LearnerConfig(
        ranks=world,
        sequence_parallel=parts,
        zero_stage=stage,
        # Longer than some rows and shorter than others; the last share of four rows gets none in its second pass.
        micro_batch_tokens=64,
        logprob_chunk_tokens=CHUNK_TOKENS,
        epochs=2,
        optimizer=OPTIMIZER,
    )


def batch_for(method: Any, learner: LearnerConfig, share: int) -> RankBatch:
    """This share's rows of a batch with advantages of both signs."""
    made = rollouts(1)
    batch, credit = batch_of(made)
    learning = Learning(method, learner, CriticConfig(), Sampling(0.9, 1.0, 0, 40, ()), 9)
    shards = make_shards(batch, batch.scores, credit, learning, 0.0, 1, learner.shares)
    return rank_batch(shards[share], made, ())


def offloads(engine: ModelEngine) -> bool:
    """Whether DeepSpeed's optimizer has its state in the host's memory, by its own account."""
    optimizer: Any = engine._deepspeed._engine.optimizer  # pyright: ignore[reportPrivateUsage]
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


def run_policy(model: Path, world: int, parts: int, case: str) -> dict[str, Any]:
    name, stage, dtype, checkpointing = CASES[case]
    method, learner = ALGORITHMS[METHODS[name].name](METHODS[name]), learner_of(world, parts, stage)
    if world > 1 and "offloaded" in case:
        learner = replace(learner, offload="optimizer")
    settings = ModelConfig(dtype=dtype, gradient_checkpointing=checkpointing)  # type: ignore[arg-type]
    engine = ModelEngine(model, settings, learner, OPTIMIZER, device="cpu", bucket_mib=1)
    policy = PolicyLearner(engine, method)
    found: dict[str, Any] = {"start": weights(engine), "offloads": offloads(engine)}
    found["metrics"] = policy.update(batch_for(method, learner, engine.share), None, AS_THEY_ARE)
    found["two"] = weights(engine)
    row = [rows_of(group) for group in rollouts(3)][1]
    with torch.no_grad():
        found["logprobs"] = engine.logprobs(pack_rows(row, torch.device("cpu")), 1.0)
    engine.close()
    return found


def run_critic(model: Path, world: int, parts: int) -> dict[str, Any]:
    """Two passes over a batch, after the credit that comes of its values."""
    learner = learner_of(world, parts, 3)
    engine = ScalarEngine(model, ModelConfig(), learner, OPTIMIZER, device="cpu")
    critic = CriticLearner(engine, PPO, CriticConfig(), kl_in_reward=False)
    found: dict[str, Any] = {"start": weights(engine)}
    batch = batch_for(PPO, learner, engine.share)
    batch = replace(batch, critic_rates=batch.learning_rates)
    sums, estimate = critic.estimate(batch)
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, sums)
    found["credit"] = EstimateSums.merge(everyone[::parts])
    critic.update(batch, estimate)
    found["two"] = weights(engine)
    rows = [row for group in rollouts(2) for row in rows_of(group)]
    with torch.no_grad():
        mine = batch_share(rows, engine.share, learner.shares, 64)
        found["scores"] = [engine.scores(pack_rows(chosen, torch.device("cpu"))) for chosen in mine]
    return found


def weights(engine: ModelEngine | ScalarEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights()}


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    model, critic, folder = (Path(word) for word in sys.argv[4:7])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    found: dict[Any, Any] = {}
    for parts in (1,) if world == 1 else (2, 4):
        for case in CASES if parts < 4 else WITH_FOUR:
            found[parts, case] = run_policy(model, world, parts, case)
        found[parts, "critic"] = run_critic(critic, world, parts)
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
