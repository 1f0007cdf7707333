"""The simulated critic: as the learner, its weights are a word; its estimates are made of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from chaos.disk import Disk
from chaos.plan import CRITIC
from chaos.ranks import Ranks
from chaos.servers import Trained
from chaos.truth import digest, number
from chaos.world import World
from rlhf_dist.learner.numbers_check import RankFault
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import Estimate, EstimateSums
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Handle

START = "the policy's start"
WEIGHTS_FILE, OPTIMIZER_FILE = "critic/hf/config.json", "critic/optimizer-0.safetensors"


class Critic:
    """`ports.Critic`."""

    def __init__(
        self,
        world: World,
        disk: Disk,
        processes: Ranks,
        folder: Path | None,
        told: Callable[[int, Trained], None],
        alone: int,
    ) -> None:
        """As `Learner`. In its first `alone` steps the policy stands still, so that it tells what is learnt from."""
        self._world, self._disk, self._processes, self._told = world, disk, processes, told
        self._alone = alone
        self.step = 0
        self.restore(folder)
        processes.trained.append(self)

    def restore(self, folder: Path | None) -> None:
        """See `ranks.Trains`."""
        self.weights = START if folder is None else (folder / WEIGHTS_FILE).read_text(encoding="utf-8")

    def estimate(self, batches: Batches) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        """See `ports.Critic`."""
        self._processes.work(CRITIC, 0.5)
        found = [digest(self.weights, [group.digest for group in batch.place[1]]) for batch in batches]
        # 2 tokens with advantages 1 and 3 and returns 4 and 8, and values of which the run's metrics show the mean.
        sums = EstimateSums(2.0, 4.0, 10.0, 12.0, 80.0, number(found), 10.0)
        handles: list[Handle[Any]] = [Handle(one) for one in found]
        return handles, EstimateSums.merge([sums] * len(batches))

    def begin_update(self, batches: Batches, estimates: Estimates) -> Handle[MetricSums]:
        """See `ports.Critic`."""
        shard: Shard
        groups: tuple[Trained, ...]
        shard, groups = batches[0].place
        self.step, refusals = shard.version + 1, self._processes.refusals
        if refusals.refuses(CRITIC, self.step, groups):
            return Handle(MetricSums({"critic/updates": (0.0, 1.0)}, {names.CRITIC_FAULT: 1.0}))
        if self.step <= self._alone:
            for group in groups:
                self._told(self.step, group)
            refusals.learnt(self.step)
        told = [group.digest for group in groups], [handle.place for handle in estimates.handles], shard.critic_rates
        self.weights = digest(self.weights, told)
        return Handle(MetricSums({"critic/loss": (number(self.weights), 1.0), "critic/updates": (1.0, 1.0)}))

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        """See `ports.Critic`."""
        self._processes.work(CRITIC, self._world.seconds(0.5, 10.0, "learn", self.step))
        return pending.place

    def faults(self) -> Mapping[str, RankFault]:
        """See `ports.Critic`."""
        self._processes.work(CRITIC, 0.1)
        return {CRITIC: RankFault("loss", math.nan, 0)}

    def save(self, folder: Path) -> None:
        """See `ports.Critic`."""
        self._processes.work(CRITIC, 0.5)
        self._disk.write("write critic", folder / WEIGHTS_FILE, self.weights)
        self._disk.write("write critic's optimizer", folder / OPTIMIZER_FILE, self.weights)
