"""Optimizer steps with numbers that are not finite, on the ranks of `witness_ranks.py`: refused, and nothing stays."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import OPTIMIZER, rollouts, stepped
from witness_ranks import CASES, METHOD, OF_NUMBERS, cases, cut, learner_of

from rlhf_dist.algo.recipes import ppo
from rlhf_dist.config.schema import AlgoConfig, CriticConfig, LearnerConfig, ModelConfig
from rlhf_dist.learner.critic import CriticLearner
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.rank_batch import RankBatch, rank_batch
from rlhf_dist.learner.scalar_engine import ScalarEngine
from rlhf_dist.learner.token_sums import AS_THEY_ARE, Estimate

FEW = ("zero 0", "zero 3", "zero 1, bfloat16")
"""Cases of two ranks that every run of the tests has: DeepSpeed's optimizers differ most in these."""
INFINITE, TOO_LARGE = np.inf, 1e37
"""Advantages: of the first the loss is infinite, of the second the norm of the gradient alone."""


def batch_of_share(learner: LearnerConfig, share: int) -> RankBatch:
    return rank_batch(cut(learner)[2][share], rollouts(1), ())


def bad_row(batch: RankBatch) -> int:
    """One of the second of the four optimizer steps."""
    return int(np.concatenate(batch.updates[1])[0])


def spoilt(batch: RankBatch, advantage: float) -> RankBatch:
    """With this advantage for a row of the second optimizer step."""
    advantages = batch.advantages.copy()
    advantages[bad_row(batch)] = advantage
    return replace(batch, advantages=advantages)


def only_first(batch: RankBatch) -> RankBatch:
    """With the first of the four optimizer steps alone."""
    return replace(batch, updates=batch.updates[:1], epochs=1, learning_rates=batch.learning_rates[:1])


def train(model: Path, learner: LearnerConfig, case: str, advantage: float | None) -> dict[str, Any]:
    """The batch, spoilt on the ranks of the first share, then the same as it should be.

    `advantage`: None: in place of the spoilt one what should be left of it.
    """
    dtype = (CASES | OF_NUMBERS)[case][1]
    engine = ModelEngine(model, ModelConfig(dtype=dtype), learner, OPTIMIZER, device="cpu", bucket_mib=1)  # type: ignore[arg-type]
    check = engine.numbers_check()
    policy = PolicyLearner(engine, METHOD, witness=engine.witness(), check=check)
    batch = batch_of_share(learner, engine.share)
    first = only_first(batch) if advantage is None else spoilt(batch, advantage) if engine.share == 0 else batch
    metrics = policy.update(first, None, AS_THEY_ARE)
    assert policy.witness is not None
    found = {"metrics": metrics, "refused": check.refused, "fault": check.fault, "seen": policy.witness.seen()}
    policy.update(batch, None, AS_THEY_ARE)
    weights = {name: tensor.clone() for name, tensor in engine.weights()}
    optimizer = stepped(engine)
    engine.close()
    return found | {"weights": weights, "optimizer": optimizer, "row": batch.origins[bad_row(batch)]}


def critic(model: Path, learner: LearnerConfig) -> dict[str, Any]:
    """A critic that is to learn a return that is no number, on one rank."""
    engine = ScalarEngine(model, ModelConfig(), learner, OPTIMIZER, device="cpu")
    check = engine.numbers_check()
    critic = CriticLearner(engine, ppo(AlgoConfig(name="ppo")), CriticConfig(), kl_in_reward=False, check=check)
    batch = batch_of_share(learner, engine.share)
    batch = replace(batch, critic_rates=batch.learning_rates)
    values = np.zeros(len(batch.sampled), np.float32)
    returns = values + 1.0
    if engine.share == 0:
        returns[int(batch.offsets[bad_row(batch)])] = np.nan
    metrics = critic.update(batch, Estimate(values, returns, values))
    return {"metrics": metrics, "fault": check.fault, "row": batch.origins[bad_row(batch)]}


def run(model: Path, case: str, world: int = 2) -> dict[str, Any]:
    """All of it."""
    learner = learner_of(world, case)
    found = {"infinite": train(model, learner, case, INFINITE), "without": train(model, learner, case, None)}
    if not case.startswith("zero 3"):  # whose norm is made in float64, so that clipping makes such gradients small
        found["too large"] = train(model, learner, case, TOO_LARGE)
    return found | ({"critic": critic(model, learner)} if "float16" not in case else {})


def main() -> None:
    """Every case: `python numbers_ranks.py RANK WORLD PORT MODEL FOLDER`."""
    rank, world, port = (int(word) for word in sys.argv[1:4])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    chosen = [*cases(world), *OF_NUMBERS]
    torch.save({case: run(Path(sys.argv[4]), case, world) for case in chosen}, f"{sys.argv[5]}/{world}-{rank}.pt")


if __name__ == "__main__":
    main()
