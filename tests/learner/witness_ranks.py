"""One rank whose optimizer is asked what it took: `python witness_ranks.py RANK WORLD PORT MODEL FOLDER`.

Trains a fixed batch with the witness and without, and with plans that were tampered with in one rank. Leaves
`WORLD-RANK.pt`, what the tests compare.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import OPTIMIZER, SAMPLING, batch_of, rollouts, stepped

from rlhf_dist.algo.recipes import grpo
from rlhf_dist.config.schema import AlgoConfig, CriticConfig, KLConfig, LearnerConfig, ModelConfig
from rlhf_dist.learner.deepspeed_engine import init_process_group
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.rank_batch import RankBatch, rank_batch
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import AS_THEY_ARE
from rlhf_dist.loop.batch import Batch
from rlhf_dist.loop.step import Learning, make_shards
from rlhf_dist.types import Credit

METHOD = grpo(AlgoConfig(clip_low=1e-4, clip_high=1e-4, kl=KLConfig(coef=0.0)))
"""Clips nearly every token after the first optimizer step."""
IDLE = [1, 5, 6, 7, 8]
"""Rows without an advantage: one of the first group, one of the second, and all three of the third."""
CASES = {
    "zero 0": (0, "float32", 1, False),
    "zero 1": (1, "float32", 1, False),
    "zero 2": (2, "float32", 1, False),
    "zero 3": (3, "float32", 1, False),
    "zero 3, offloaded": (3, "float32", 1, True),
    "zero 2, bfloat16": (2, "bfloat16", 1, False),
    "zero 2, two ranks a row": (2, "float32", 2, False),
}
"""ZeRO stage, dtype, ranks that share a row, offloaded optimizer."""
OF_NUMBERS = {"zero 1, bfloat16": (1, "bfloat16", 1, False), "zero 3, bfloat16": (3, "bfloat16", 1, False)}
"""More, of `numbers_ranks.py`."""
Change = Callable[[RankBatch], RankBatch]


def cases(world: int) -> list[str]:
    """Those that so many ranks can do."""
    return [case for case, (_, _, parts, offloaded) in CASES.items() if world > 1 or (parts == 1 and not offloaded)]


def learner_of(world: int, case: str) -> LearnerConfig:
    stage, _, parts, offloaded = (CASES | OF_NUMBERS)[case]
    return LearnerConfig(
        ranks=world,
        sequence_parallel=parts,
        zero_stage=stage,  # type: ignore[arg-type]
        offload="optimizer" if offloaded else "none",
        micro_batch_tokens=48,
        epochs=2,
        updates_per_batch=2,
        optimizer=OPTIMIZER,
    )


def cut(learner: LearnerConfig) -> tuple[Batch, Credit, list[Shard]]:
    """Two optimizer steps a pass, of several micro-batches each."""
    batch, credit = batch_of(rollouts(1))
    advantages = credit.advantages.copy()
    advantages[IDLE] = 0.0
    credit = Credit(advantages)
    learning = Learning(METHOD, learner, CriticConfig(), SAMPLING, 9)
    return batch, credit, make_shards(batch, batch.scores, credit, learning, 0.0, 1, learner.shares)


def dropped(batch: RankBatch) -> RankBatch:
    """Without the first row of its first micro-batch."""
    (first, *others), *rest = batch.updates
    return replace(batch, updates=((first[1:], *others), *rest))


def doubled(batch: RankBatch) -> RankBatch:
    """With the first row of its first micro-batch in the last one of the same optimizer step, too."""
    (*others, last), *rest = batch.updates
    return replace(batch, updates=((*others, np.append(last, [*others, last][0][:1])), *rest))


def exchanged(batch: RankBatch) -> RankBatch:
    """Another body under the plan's first row: as if the collator had mixed two groups up."""
    return replace(batch, origins=(batch.origins[-1], *batch.origins[1:]))


TAMPERED: dict[str, Change] = {"dropped": dropped, "doubled": doubled, "exchanged": exchanged}
"""What is changed on the ranks of the first share, of which there is one where all ranks share their rows."""


def train(
    model: Path, learner: LearnerConfig, case: str, witness: bool, change: Change | None = None
) -> dict[str, Any]:
    """A training step's update, and what it left."""
    dtype = CASES[case][1]
    engine = ModelEngine(model, ModelConfig(dtype=dtype), learner, OPTIMIZER, device="cpu", bucket_mib=1)  # type: ignore[arg-type]
    policy = PolicyLearner(engine, METHOD, witness=engine.witness() if witness else None)
    batch = rank_batch(cut(learner)[2][engine.share], rollouts(1), ())
    if change is not None and engine.share == 0:
        # What is measured before the first optimizer step is of the plan as it was: else that would object already.
        given = policy._given(batch, None, AS_THEY_ARE)  # pyright: ignore[reportPrivateUsage]
        policy._given = lambda *_: given  # type: ignore[method-assign]
        batch = change(batch)
    metrics = policy.update(batch, None, AS_THEY_ARE)
    found = {
        "metrics": metrics,
        "weights": {name: tensor.clone() for name, tensor in engine.weights()},
        "optimizer": stepped(engine),
        "seen": policy.witness and policy.witness.seen(),
        "micro-batches": [[len(chosen) for chosen in update] for update in batch.updates],
    }
    engine.close()
    return found


def without_a_step(model: Path, learner: LearnerConfig, case: str) -> Any:
    """What is seen where the second of four optimizer steps is skipped, as one with gradients that are no numbers would
    be, and a backward pass of the third does not run."""
    engine = ModelEngine(model, ModelConfig(), learner, OPTIMIZER, device="cpu", bucket_mib=1)
    policy = PolicyLearner(engine, METHOD, witness=engine.witness())
    step, backward, steps, passes = engine.step, engine.backward, [], []

    def stepped(lr: float) -> float:
        steps.append(lr)
        return 1.0 if len(steps) == 2 else step(lr)

    def passed(loss: torch.Tensor, last: bool) -> None:
        passes.append(len(steps))
        if not (len(steps) == 2 and passes.count(2) == 1):
            backward(loss, last)

    engine.step, engine.backward = stepped, passed  # type: ignore[method-assign]
    policy.update(rank_batch(cut(learner)[2][0], rollouts(1), ()), None, AS_THEY_ARE)
    engine.close()
    assert policy.witness is not None
    return policy.witness.seen()


def main() -> None:
    rank, world, port = (int(word) for word in sys.argv[1:4])
    model, folder = Path(sys.argv[4]), Path(sys.argv[5])
    init_process_group(rank, world, "127.0.0.1", port, device="cpu", threads=1, timeout_s=120.0)
    found: dict[Any, Any] = {}
    for case in cases(world):
        learner = learner_of(world, case)
        found[case] = {witness: train(model, learner, case, witness) for witness in (False, True)}
    for case in (case for case in ("zero 2", "zero 2, two ranks a row") if case in cases(world)):
        for name, change in TAMPERED.items():
            found[case, name] = train(model, learner_of(world, case), case, True, change)["seen"]
    if world == 2:
        import numbers_ranks  # which imports this file

        found["numbers"] = {case: numbers_ranks.run(model, case) for case in numbers_ranks.FEW}
    if world == 1:
        found["skipped"] = without_a_step(model, learner_of(world, "zero 0"), "zero 0")
    torch.save(found, folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main()
