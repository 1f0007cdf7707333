"""What a run asks of its controller: the parts of the config that its decisions depend on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
import torch

from rlhf_dist.algo.masking import all_equal
from rlhf_dist.config.admission import target_lag, window_of
from rlhf_dist.config.methods import METHODS
from rlhf_dist.config.schema import Config
from rlhf_dist.types import GroupHead, Prompt, Sampling


class Prompts(Protocol):
    """Where the prompts of training come from."""

    def __len__(self) -> int:
        """Prompts in one epoch."""
        ...

    def take(self, n: int) -> list[tuple[Prompt, int]]:
        """The next n, each with the number of its attempt: 0, but for groups that a resumed run had open."""
        ...


@dataclass(frozen=True, slots=True)
class Rules:
    """See `controller`."""

    groups_per_step: int
    """P."""
    steps: int
    """Of the whole run: no more groups are issued than they need."""
    max_lag: int
    """L."""
    target_lag: int
    """S."""
    window: int
    """W, in groups."""
    extra_groups: int
    """Issued beyond P in each step, where S is 0; the slowest so many are cancelled, and the window does not count."""
    age: Literal["oldest", "mean", "first"]
    """Which token's version says how old a group is."""
    drop_stale: bool
    """Whether a group older than L is dropped; else it is trained on."""
    filter_groups: bool
    """Drop groups whose samples all score the same."""
    filtered: int
    """Of the groups issued since a step was taken, so many may be dropped for that; later ones are kept."""
    group_size: int
    sampling: Sampling
    """How training samples."""
    seed: int
    """The run's."""
    greedy_baseline: bool
    """A greedy response beside each group."""
    compares: bool
    """There is a reference model."""
    max_failed_share: float
    """Of the responses that are scored, so many may have no reward; more end the run."""
    hedge_s: float = 0.0
    """See `servers.Servers`."""
    life: int = 0
    """How often the learner was started again before; part of the key of every request."""

    @property
    def seats(self) -> int:
        """Groups that may be open, or in a step whose version is not published."""
        return (self.target_lag + 1) * self.groups_per_step + self.extra_groups

    def filters(self, total: np.ndarray, since: int) -> bool:
        """Whether a group with these scores is made up for; it was issued as number `since` after the oldest open one
        when a step was taken last."""
        return self.filter_groups and since < self.filtered and all_equal(torch.from_numpy(total))

    def age_of(self, head: GroupHead, version: int) -> float:
        """Published versions between `version` and the weights that sampled the group, by `age`."""
        sampled = {"oldest": head.oldest_version, "mean": head.mean_version, "first": head.first_version}
        return version - sampled[self.age]


def rules_of(config: Config, compares: bool, masked: bool) -> Rules:
    """Of a training run. `masked`: its method has a mask on what may be drawn."""
    loop, algo = config.loop, config.algo
    groups = loop.prompts_per_step
    return Rules(
        groups_per_step=groups,
        steps=loop.steps,
        max_lag=loop.max_policy_lag,
        target_lag=target_lag(loop),
        window=window_of(loop),
        extra_groups=math.ceil(loop.oversample * groups) - groups,
        age=loop.age,
        drop_stale=loop.stale == "drop",
        filter_groups=algo.filter_groups,
        filtered=((target_lag(loop) + 1) * algo.filter_rounds - 1) * groups,
        group_size=algo.group_size,
        sampling=replace(sampling_of(config), masked=masked),
        seed=config.seed,
        greedy_baseline=METHODS[algo.name].baseline == "greedy",
        compares=compares,
        max_failed_share=config.scoring.max_failed_share,
        hedge_s=config.scoring.hedge_s,
    )


def sampling_of(config: Config) -> Sampling:
    """Training's own way to sample, but for a mask."""
    rollout = config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_response_tokens,
        stop=tuple(rollout.stop),
    )
