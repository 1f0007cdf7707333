"""Light stand-ins for the processes around the loop; they do as they are told and take no time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.learner.model_engine import checkpoint_files
from rlhf_dist.learner.policy import Shard
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import DroppedPrompt, Handle, Message, Prompt, RolloutHead, Sampling, Scores
from rlhf_dist.weights.plan import make_plan
from rlhf_dist.weights.receipts import Announcement

PLAN = make_plan([("a", (4,), "float32")], 8)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"0/{number}", (Message("user", "x"),), "", "test") for number in range(count)]


def write_checkpoint(folder: Path, ranks: int) -> None:
    """What learner ranks leave behind."""
    for name in checkpoint_files(ranks):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.touch()


@dataclass
class FakeRollouts:
    """Every response has 3 tokens; its handle is (uid, samples)."""

    drops: Sequence[str] = ()
    """Prompts that give no response: `0/1`, or `*` for all."""
    loses: Sequence[str] = ()
    """Prompts that never come back."""
    served: list[str] = field(default_factory=list)
    version: int = -1

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling
    ) -> Iterator[tuple[RolloutHead, Handle] | DroppedPrompt]:
        for prompt in reversed(prompts):
            self.served.append(prompt.uid)
            if prompt.uid in self.drops or "*" in self.drops:
                yield DroppedPrompt(prompt.uid, "prompt_empty", "no known characters")
            elif prompt.uid not in self.loses:
                lengths, reasons = np.full(sampling.n, 3), ("stop",) * sampling.n
                head = RolloutHead(prompt.uid, 2, lengths, reasons, self.version, self.version, "rollout worker 0")
                yield head, (prompt.uid, sampling.n)

    def load_weights(self, announcement: Announcement) -> list[str]:
        self.version = announcement.version
        return []

    def texts(self, rollout: Handle) -> tuple[str, ...]:
        return ("abc",)


@dataclass
class FakeScoring:
    """The first sample of a group is right, the others are wrong."""

    def submit(self, rollout: Handle) -> Handle:
        return rollout

    def gather(self, pending: Mapping[str, Handle]) -> dict[str, Scores]:
        found = {}
        for uid, (_, samples) in pending.items():
            total = np.zeros(samples, np.float32)
            total[0] = 1.0
            found[uid] = Scores(total, {"exact": total})
        return found


@dataclass
class FakePolicy:
    """Measures the logprob difference it is told to."""

    ranks: int = 2
    difference: float = 0.0
    saves: bool = True
    fails_at: int = 0
    """Update that raises, from 1."""
    updates: int = 0

    def update(self, shards: Sequence[Shard], rollouts: Sequence[Handle]) -> MetricSums:
        self.updates += 1
        if self.updates == self.fails_at:
            raise RuntimeError("the machine went down")
        return MetricSums({"policy/loss": (0.0, 1.0)}, {"rollout/logprob_diff_max": self.difference})

    def publish(self, version: int) -> Announcement:
        return Announcement(version, "unused", PLAN, (f"hash {version}",))

    def save(self, folder: Path) -> None:
        if self.saves:
            write_checkpoint(folder, self.ranks)


class Quiet:
    """A display that nobody looks at."""

    def stage(self, message: str) -> None: ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def eval(self, step: int, results: Mapping[str, float]) -> None: ...

    def warn(self, message: str) -> None: ...

    def close(self) -> None: ...


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
