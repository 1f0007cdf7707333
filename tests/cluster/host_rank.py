"""The learner's hosts of a PPO run in a process of their own, one rank each: `python host_rank.py MODEL FOLDER KIND`.

KIND: `turns` (policy and critic in one host), `shared` (one trunk) or `beside` (the critic's own host). Makes two
steps, a checkpoint and a third step; hosts that resume publish what they have, as a run does, save at once and make the
third step again. Then a weight of the policy is made NaN. Leaves KIND.pt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sample_groups import PROMPT, group_of

from rlhf_dist.algo.recipes import ppo
from rlhf_dist.cluster import learner_hosts
from rlhf_dist.cluster.learner_hosts import CriticHost, PolicyHost
from rlhf_dist.cluster.sources import with_sources
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.config.schema import (
    AlgoConfig,
    Config,
    CriticConfig,
    KLConfig,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    PtxConfig,
)
from rlhf_dist.learner import deepspeed_engine
from rlhf_dist.learner.rank_batch import rank_batch
from rlhf_dist.loop.controller_rules import sampling_of
from rlhf_dist.loop.step import Learning, assign_credit, collate, make_shards
from rlhf_dist.rollout.trajectories import head_of
from rlhf_dist.types import Experience, Group, ReferenceHead, Scores

OPTIMIZER = OptimizerConfig(lr=0.01, warmup_steps=0)


def config_of(kind: str, model: Path, folder: Path) -> Config:
    start = "shared" if kind == "shared" else "policy"
    return Config(
        output=str(folder),
        model=ModelConfig(path=str(model)),
        algo=AlgoConfig(name="ppo", group_size=2, kl=KLConfig(coef=0.1)),
        learner=LearnerConfig(optimizer=OPTIMIZER, epochs=2, ema_decay=0.5),
        critic=CriticConfig(start=start, side_by_side=kind == "beside", optimizer=OPTIMIZER),
        ptx=PtxConfig(coef=0.1, batch_size=2),
    )


def experiences(step: int) -> tuple[list[Experience], list[Group], list[np.ndarray]]:
    chance = np.random.default_rng(step)
    made, references, found = [], [], []
    for group in range(3):
        lengths = chance.integers(1, 9, size=2)
        total = int(lengths.sum())
        body = group_of(
            chance.integers(5, 60, size=4),
            chance.integers(5, 60, size=total),
            lengths,
            prompt=replace(PROMPT, uid=f"0/{group}"),
            logprobs=-4.0,
            version=step - 1,
        )
        reference = chance.normal(-4.5, 0.3, size=total).astype(np.float32)
        scores = Scores(chance.normal(size=2).astype(np.float32), {}, np.ones(2), np.zeros(2, np.uint64))
        compared = ReferenceHead(np.zeros(2, np.float32), np.zeros(2, np.float32))
        found.append(Experience(body.prompt, head_of(body), scores, body.request.key, compared))
        made.append(body)
        references.append(reference)
    return found, made, references


class Hosts:
    """The policy's host, and the one that holds the critic."""

    def __init__(self, config: Config, source: Path, folder: Path | None, logs: Path) -> None:
        self.config = with_sources(config, str(source), folder, learns=True)
        spec = ActorSpec("rank", self.config, str(source), "cpu", 1, str(logs / "host.log"), 0, str(logs))
        kinds = [PolicyHost, CriticHost] if config.critic.side_by_side else [PolicyHost]
        hosts = [kind(spec) for kind in kinds]
        for host in hosts:
            if torch.distributed.is_initialized():  # This process stands for several; it has met itself already.
                deepspeed_engine.init_process_group = lambda *_, **__: None
            host.join(*host.address(1), None if folder is None else str(folder))
        self.policy: Any = hosts[0]
        self.critic: Any = hosts[-1]

    def step(self, step: int) -> dict[str, float]:
        """As `loop.step` and the groups do it."""
        config = self.config
        found, made, references = experiences(step)
        batch = collate(found)
        learning = Learning(ppo(config.algo), config.learner, config.critic, sampling_of(config), 9)
        credit = assign_credit(batch, batch.scores, learning.algorithm, 0.0)
        (shard,) = make_shards(batch, batch.scores, credit, learning, 0.1, step, 1)
        made_of = rank_batch(shard, made, references)
        sums, (estimate,) = self.critic.estimate(made_of)
        values = {}
        if config.critic.start != "shared":
            values = self.critic.update_critic(made_of, estimate).values()
        values |= self.policy.update(made_of, estimate, sums.whitening()).values()
        self.policy.publish(step)
        return values

    def save(self, folder: Path) -> None:
        folder.mkdir()
        self.policy.save(folder)
        if self.config.critic.start != "shared":
            self.critic.save_critic(folder)


def main() -> None:
    learner_hosts.ray = SimpleNamespace(put=lambda record: record)  # type: ignore[assignment]  # no Ray in this process
    model, folder, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    config = config_of(kind, model, folder)
    hosts = Hosts(config, model, None, folder)
    hosts.step(1)  # The moving average begins with these weights; with the next it differs from them.
    found: dict[str, Any] = {"second": hosts.step(2)}
    hosts.save(folder / f"{kind}-2")
    found["third"] = hosts.step(3)
    hosts.save(folder / f"{kind}-3")
    hosts.policy.close()
    again = Hosts(config, folder / f"{kind}-2" / "hf", folder / f"{kind}-2", folder)
    again.policy.publish(2)
    again.save(folder / f"{kind}-restored")
    found["again"] = again.step(3)
    again.save(folder / f"{kind}-again")
    again.policy._engine._deepspeed._engine.module.model.model.norm.weight.data[3] = torch.nan
    found["spoilt"] = again.step(4), again.policy.fault()
    again.policy.close()
    torch.save(found, folder / f"{kind}.pt")


if __name__ == "__main__":
    main()
