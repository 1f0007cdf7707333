"""The simulated learner: its weights are a word, which depends on all that was learnt, in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from chaos.disk import Disk
from chaos.plan import LEARNER
from chaos.ranks import Ranks
from chaos.servers import Trained
from chaos.truth import digest
from chaos.world import World
from rlhf_dist.learner.numbers_check import RankFault
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement

WEIGHTS_FILE, OPTIMIZER_FILE = "hf/config.json", "optimizer-0.safetensors"
START = "the start"
LAYOUT = make_plan([("a", (4,), "float32")], 8)


class Learner:
    """`ports.Policy` and `weights.sync.Publisher`."""

    ranks = 1

    def __init__(
        self,
        world: World,
        disk: Disk,
        processes: Ranks,
        history: dict[int, str],
        folder: Path | None,
        told: Callable[[int, Trained], None],
    ) -> None:
        """`history`: version -> weights published as that. `folder`: the checkpoint that the run goes on from.

        `told` hears of each group that is learnt from, with its step.
        """
        self._world, self._disk, self._processes = world, disk, processes
        self._history, self._told = history, told
        self.step = 0
        self._seen: tuple[Seen, ...] = ()
        self.restore(folder)
        processes.trained.append(self)

    def restore(self, folder: Path | None) -> None:
        """See `ranks.Trains`."""
        self.weights = START if folder is None else (folder / WEIGHTS_FILE).read_text(encoding="utf-8")

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        """See `ports.Policy`."""
        shard: Shard
        groups: tuple[Trained, ...]
        shard, groups = batches[0].place
        self._work(self._world.seconds(0.5, 15.0, "train", shard.version))
        self.step, refusals = shard.version + 1, self._processes.refusals
        if refusals.refuses(LEARNER, self.step, groups):
            self._seen = (Seen((), np.zeros(0)),)
            return MetricSums({"learner/updates": (0.0, 1.0)}, {names.FAULT: 1.0})
        for group in groups:
            self._told(self.step, group)
        refusals.learnt(self.step)
        rows = [part.tobytes() for part in (shard.groups, shard.samples, shard.advantages, shard.weights)]
        credit = [handle.place for handle in estimates.handles], estimates.whitening
        told = [group.digest for group in groups], rows, shard.learning_rates, shard.kl_coef, credit
        self.weights = digest(self.weights, told)
        self._seen = (seen_of(shard, groups),)
        return MetricSums({"policy/loss": (0.0, 1.0), "learner/updates": (1.0, 1.0)}, {"rollout/logprob_diff_max": 0.0})

    def witnessed(self) -> Sequence[Seen]:
        """See `ports.Policy`."""
        self._work(0.1)
        return self._seen

    def publish(self, version: int) -> Announcement:
        """See `weights.sync.Publisher`."""
        self._work(0.1)
        self._processes.refusals.published(version)
        self._history[version] = self.weights
        return Announcement(version, "", 0, LAYOUT, (self.weights,))

    def faults(self) -> Mapping[str, RankFault]:
        """See `ports.Policy`."""
        self._work(0.1)
        return {LEARNER: RankFault("loss", math.nan, 0)}

    def save(self, folder: Path) -> None:
        """See `ports.Policy`."""
        self._work(self._world.seconds(0.1, 20.0, "save", folder.name))
        self._disk.write("write weights", folder / WEIGHTS_FILE, self.weights)
        self._disk.write("write optimizer", folder / OPTIMIZER_FILE, self.weights)

    def _work(self, seconds: float) -> None:
        self._processes.work(LEARNER, seconds)


def seen_of(shard: Shard, groups: Sequence[Trained]) -> Seen:
    """What the optimizer took of a shard: one step, with all micro-batches of it."""
    rows = zip(shard.groups.tolist(), shard.samples.tolist(), strict=True)
    times = np.zeros(len(shard.groups))
    for update in shard.updates:
        for chosen in update:
            np.add.at(times, chosen, 1.0)
    return Seen(tuple((groups[group].key, sample) for group, sample in rows), times)
