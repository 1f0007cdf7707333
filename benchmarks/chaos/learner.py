"""The simulated learner: its weights are a word, which depends on all that was learnt, in order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from chaos.disk import Disk
from chaos.plan import LEARNER, Fault
from chaos.servers import Trained
from chaos.truth import digest
from chaos.world import World
from rlhf_dist.errors import ActorLost
from rlhf_dist.learner.numbers_check import RankFault
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.ports import Batches, Estimates
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
        history: dict[int, str],
        folder: Path | None,
        told: Callable[[int, Trained], None] | None,
    ) -> None:
        """`history`: version -> weights published as that. `folder`: the checkpoint that the run goes on from.

        `told` hears of each group that is learnt from, with its step; None where the critic tells.
        """
        self._world, self._disk, self._history, self._told = world, disk, history, told
        self.weights = START if folder is None else (folder / WEIGHTS_FILE).read_text(encoding="utf-8")
        self._dead = False
        world.plan_strikes("die", [LEARNER], self._die)

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        """See `ports.Policy`."""
        shard: Shard
        groups: tuple[Trained, ...]
        shard, groups = batches[0].place
        self._work(self._world.seconds(0.5, 15.0, "train", shard.version))
        if self._told is not None:
            for group in groups:
                self._told(shard.version + 1, group)
        rows = [part.tobytes() for part in (shard.groups, shard.samples, shard.advantages, shard.weights)]
        credit = [handle.place for handle in estimates.handles], estimates.whitening
        told = [group.digest for group in groups], rows, shard.learning_rates, shard.kl_coef, credit
        self.weights = digest(self.weights, told)
        return MetricSums({"policy/loss": (0.0, 1.0)}, {"rollout/logprob_diff_max": 0.0})

    def witnessed(self) -> Sequence[Seen]:
        """See `ports.Policy`: no run here has `loop.witness`."""
        raise NotImplementedError

    def publish(self, version: int) -> Announcement:
        """See `weights.sync.Publisher`."""
        self._work(0.1)
        self._history[version] = self.weights
        return Announcement(version, "", 0, LAYOUT, (self.weights,))

    def faults(self) -> Mapping[str, RankFault]:
        """See `ports`: its numbers are always right."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """See `ports.Policy`."""
        self._work(0.5)
        self._disk.write("write weights", folder / WEIGHTS_FILE, self.weights)
        self._disk.write("write optimizer", folder / OPTIMIZER_FILE, self.weights)

    def begin(self, name: str) -> None:
        """It is never started again."""
        raise NotImplementedError

    def end(self, name: str) -> None:
        """See `begin`."""
        raise NotImplementedError

    def gives_signs(self, name: str) -> bool:
        """Whether it shows that it lives."""
        return not self._dead

    def _work(self, seconds: float) -> None:
        self._world.inbox.wait(seconds, lambda: self._dead)
        if self._dead:
            raise ActorLost(f"{LEARNER} died")

    def _die(self, fault: Fault) -> None:
        self._dead = True
