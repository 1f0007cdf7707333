"""The methods of `plain_methods.py` on a learner rank: the same samples through shards, packed rows and DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain_methods import GREEDY, LONGEST, METHODS, OPTIMIZER, SIZES, STEPS, TEMPERATURE, Method, Sample, samples_of
from sample_groups import PROMPT, group_of

from rlhf_dist.algo.algorithm import Algorithm, TokenCredit
from rlhf_dist.algo.recipes import ALGORITHMS
from rlhf_dist.config.schema import CriticConfig, LearnerConfig, ModelConfig
from rlhf_dist.learner.model_engine import ModelEngine
from rlhf_dist.learner.policy_learner import PolicyLearner
from rlhf_dist.learner.rank_batch import rank_batch
from rlhf_dist.learner.returns import ReturnsLearner
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import AS_THEY_ARE, EstimateSums
from rlhf_dist.loop.shaper import Shaper
from rlhf_dist.loop.step import Learning, assign_credit, collate, make_shards
from rlhf_dist.rollout.trajectories import head_of
from rlhf_dist.types import Experience, Group, Handle, Sampling, Scores

SAMPLING = Sampling(temperature=TEMPERATURE, top_p=1.0, top_k=0, max_tokens=LONGEST, stop=())
MICRO_BATCH_TOKENS = 48
"""Two or three rows: an update has several micro-batches on each rank."""
CHUNK_TOKENS = 16
"""Ranks need a different number of logprob chunks in the same pass."""


def rollout_of(samples: Sequence[Sample], version: int) -> Group:
    """The samples of one prompt."""
    return group_of(
        samples[0].prompt,
        np.concatenate([sample.response for sample in samples]),
        [len(sample.response) for sample in samples],
        prompt=replace(PROMPT, uid=f"0/{samples[0].group}"),
        logprobs=np.concatenate([sample.sampled for sample in samples]),
        version=version,
    )


def cut(
    made: Sequence[Group], scores: Sequence[np.ndarray], learning: Learning, shaper: Shaper, step: int
) -> list[Shard]:
    """The shards of both ranks."""
    greedy = GREEDY[step] if learning.algorithm.greedy_baseline else (0.0,) * len(made)
    scored = [Scores(s, {}, np.zeros(len(s)), np.zeros(len(s))) for s in scores]
    experiences = [
        Experience(r.prompt, head_of(r), s, Handle(i), None, baseline)
        for i, (r, s, baseline) in enumerate(zip(made, scored, greedy, strict=True))
    ]
    batch = collate(experiences)
    shaped = shaper.shape(batch)
    credit = assign_credit(batch, shaped, learning.algorithm, 0.0)
    return make_shards(batch, shaped, credit, learning, shaper.kl_coef, step, learning.learner.ranks)


class NotingEngine(ModelEngine):
    """Notes the gradient norm of each optimizer step."""

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self.norms: list[float] = []

    def step(self, lr: float) -> float:
        self.norms.append(super().step(lr))
        return self.norms[-1]


class MethodTrainer:
    """One rank of two."""

    def __init__(self, model: Path, method: Method, stage: int) -> None:
        self.shaper = Shaper(method.algo, LONGEST)
        learner = LearnerConfig(
            ranks=2,
            zero_stage=stage,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            # In one chunk a rank without rows has to take the entropy's way back as well; in several none is missed.
            logprob_chunk_tokens=1024 if method.algo.entropy_coef else CHUNK_TOKENS,
            updates_per_batch=method.updates,
            epochs=method.epochs,
            optimizer=OPTIMIZER,
        )
        self.algorithm: Algorithm = ALGORITHMS[method.algo.name](method.algo)
        self.learning = Learning(self.algorithm, learner, CriticConfig(), SAMPLING, STEPS)
        self.engine = NotingEngine(
            model,
            ModelConfig(),
            learner,
            OPTIMIZER,
            device="cpu",
            bucket_mib=1,
        )
        self.learner = PolicyLearner(self.engine, self.algorithm)
        self.rows: list[list[int]] = []
        """[optimizer steps of first passes][micro-batches of this rank]: rows."""

    def step(self, step: int) -> None:
        samples = samples_of(step)
        groups = [[sample for sample in samples if sample.group == group] for group in range(len(SIZES[step]))]
        made = [rollout_of(group, step - 1) for group in groups]
        scores = [np.array([sample.score for sample in group], np.float32) for group in groups]
        references = [np.concatenate([np.array(s.reference, np.float32) for s in group]) for group in groups]
        shard = cut(made, scores, self.learning, self.shaper, step)[self.engine.rank]
        self.rows += [[len(chosen) for chosen in micro_batches] for micro_batches in shard.updates]
        in_loss = self.algorithm.kl_estimator is not None
        estimate, whitening = None, AS_THEY_ARE
        if isinstance(self.algorithm.credit, TokenCredit):
            credit = ReturnsLearner(self.algorithm.credit, kl_in_reward=True)
            sums, estimate = credit.estimate(rank_batch(shard, made, references))
            everyone: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everyone, sums)
            whitening = EstimateSums.merge(everyone).whitening()
        self.learner.update(rank_batch(shard, made, references if in_loss else ()), estimate, whitening)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine.weights()}


def run_methods(model: Path, stage: int) -> dict[str, dict[str, Any]]:
    """Three steps of each method, every one from the same start."""
    found: dict[str, dict[str, Any]] = {}
    for name, method in METHODS.items():
        if stage not in method.stages:
            continue
        trainer = MethodTrainer(model, method, stage)
        start = trainer.weights()
        for step in range(1, STEPS + 1):
            trainer.step(step)
        trainer.engine.close()
        found[name] = {"start": start, "three": trainer.weights(), "norms": trainer.engine.norms, "rows": trainer.rows}
    return found
