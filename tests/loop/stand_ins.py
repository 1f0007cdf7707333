"""Light stand-ins for the processes around the loop; they do as they are told and take no time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_dist.learner.critic_files import critic_files
from rlhf_dist.learner.model_engine import checkpoint_files
from rlhf_dist.learner.shard import Estimate, EstimateSums, Shard
from rlhf_dist.loop.ports import Estimates
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import (
    DroppedPrompt,
    Experience,
    Group,
    GroupHead,
    Handle,
    Message,
    Prompt,
    Referenced,
    ReferenceHead,
    Request,
    Scores,
)
from rlhf_dist.weights.plan import make_plan
from rlhf_dist.weights.receipts import Announcement

Bodies = Sequence[Handle[Group]]
References = Sequence[Handle[np.ndarray]]
PLAN = make_plan([("a", (4,), "float32")], 8)


def asked_for(pending: Mapping[str, Handle[Any]]) -> list[tuple[str, tuple[str, int]]]:
    """(uid, (uid, samples)) of groups that `FakeRollouts` made."""
    return [(uid, asked.place) for uid, asked in pending.items()]


def handles(kind: str, count: int) -> tuple[Handle[Any], ...]:
    """`KIND 0`, `KIND 1` ..., as the stand-ins name them."""
    return tuple(Handle(f"{kind} {number}") for number in range(count))


def scores_of(total: np.ndarray, components: Mapping[str, np.ndarray]) -> Scores:
    """Scores of responses that are all different and say nothing twice."""
    return Scores(total, components, np.ones(len(total), np.float32), np.arange(len(total), dtype=np.uint64))


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"0/{number}", (Message("user", "x"),), "", "test") for number in range(count)]


def head_of(uid: str, prompt: int, lengths: Sequence[int], reasons: tuple[str, ...], version: int) -> GroupHead:
    """`prompt`: tokens of the prompt."""
    sampled = np.array(lengths)
    return GroupHead(uid, sampled + prompt, sampled, reasons, version, version, "rollout worker 0")


def experience(
    number: int,
    prompt: int,
    lengths: list[int],
    scores: list[float],
    version: int = 6,
    kl: list[float] | None = None,
    reasons: tuple[str, ...] = ("stop", "stop"),
) -> Experience:
    total = np.array(scores, np.float32)
    return Experience(
        prompt=Prompt(f"0/{number}", (Message("user", "x"),), "", "test"),
        head=head_of(f"0/{number}", prompt, lengths, reasons, version),
        scores=scores_of(total, {"exact": total, "style": total * 0 + number}),
        body=Handle(f"body {number}"),
        reference=None if kl is None else referenced(number, kl),
    )


def referenced(number: int, kl: list[float]) -> Referenced:
    head = ReferenceHead(np.array(kl, np.float32), np.zeros(len(kl), np.float32))
    return Referenced(head, Handle(f"reference {number}"))


EXPERIENCES = [
    experience(0, 3, [2, 6], [1.0, 0.0]),
    experience(1, 5, [9, 1], [0.0, 0.0]),
    experience(2, 1, [4, 4], [0.0, 2.0]),
    experience(3, 2, [3, 3], [1.0, 0.0]),
]


def with_reference() -> list[Experience]:
    """The experiences with KL 0, 1, 2 ... nats, row by row."""
    return [replace(e, reference=referenced(i, [2.0 * i, 2.0 * i + 1.0])) for i, e in enumerate(EXPERIENCES)]


def write_checkpoint(folder: Path, ranks: int) -> None:
    """What learner ranks leave behind."""
    write_files(folder, checkpoint_files(ranks))


def write_files(folder: Path, names: Sequence[str]) -> None:
    """Empty files, with the folders that they are in."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
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

    def generate(self, requests: Sequence[Request]) -> Iterator[tuple[GroupHead, Handle[Group]] | DroppedPrompt]:
        for request in reversed(requests):
            self.served.append(request.uid)
            if request.uid in self.drops or "*" in self.drops:
                yield DroppedPrompt(request.uid, "prompt_empty", "no known characters")
            elif request.uid not in self.loses:
                head = head_of(request.uid, 2, [3] * request.n, ("stop",) * request.n, self.version)
                yield head, Handle((request.uid, request.n))

    def make_room(self) -> list[str]:
        return []

    def load_weights(self, announcement: Announcement) -> list[str]:
        self.version = announcement.version
        return []

    def texts(self, body: Handle[Group]) -> tuple[str, ...]:
        return ("abc",)


@dataclass
class FakeScoring:
    """The first sample of a group is right, the others are wrong."""

    def submit(self, body: Handle[Group]) -> Handle[Scores]:
        return Handle(body.place)

    def gather(self, pending: Mapping[str, Handle[Scores]]) -> dict[str, Scores]:
        found = {}
        for uid, (_, samples) in asked_for(pending):
            total = np.zeros(samples, np.float32)
            total[0] = 1.0
            found[uid] = scores_of(total, {"exact": total})
        return found


@dataclass
class FakeReference:
    """Every response is `kl` nats away; the logprobs of prompt x are `reference x`."""

    kl: float = 2.0
    asked: list[tuple[tuple[str, int], float]] = field(default_factory=list)
    """(uid, samples) and temperatures."""
    moved: list[tuple[int, float]] = field(default_factory=list)
    """Versions taken and shares kept."""
    saved: list[str] = field(default_factory=list)
    leaves: Sequence[str] = ("reference/config.json",)
    """Files that it writes into a checkpoint."""

    def submit(self, body: Handle[Group], temperature: float) -> Handle[Referenced]:
        self.asked.append((body.place, temperature))
        return Handle(body.place)

    def gather(self, pending: Mapping[str, Handle[Referenced]]) -> dict[str, Referenced]:
        found = {}
        for uid, (_, samples) in asked_for(pending):
            head = ReferenceHead(np.full(samples, self.kl, np.float32), np.full(samples, -3.0, np.float32))
            found[uid] = Referenced(head, Handle(f"reference {uid}"))
        return found

    def update(self, announcement: Announcement, keep: float) -> None:
        self.moved.append((announcement.version, keep))

    def save(self, folder: Path) -> None:
        self.saved.append(folder.name)
        write_files(folder, self.leaves)


@dataclass
class FakePolicy:
    """Measures the logprob difference it is told to."""

    ranks: int = 2
    difference: float = 0.0
    saves: bool = True
    fails_at: int = 0
    """Update that raises, from 1."""
    leaves: Sequence[str] = ()
    """Files that it writes into a checkpoint besides those of its ranks."""
    updates: int = 0
    published: int = -1
    """`updates` at the last publication of weights that had moved."""
    hash: str = ""
    order: list[str] = field(default_factory=list)
    """What was asked of it, and of a critic that has the same list."""
    given: list[tuple[Sequence[Shard], Bodies, References, Estimates]] = field(default_factory=list)
    """What every update got."""

    def update(
        self, shards: Sequence[Shard], bodies: Bodies, references: References, estimates: Estimates
    ) -> MetricSums:
        self.order.append("policy")
        self.given.append((shards, bodies, references, estimates))
        self.updates += 1
        if self.updates == self.fails_at:
            raise RuntimeError("the machine went down")
        return MetricSums({"policy/loss": (0.0, 1.0)}, {"rollout/logprob_diff_max": self.difference})

    def publish(self, version: int) -> Announcement:
        self.order.append("publish")
        if self.updates != self.published:
            self.hash, self.published = f"hash {version}", self.updates
        return Announcement(version, "unused", 0, PLAN, (self.hash,))

    def save(self, folder: Path) -> None:
        if self.saves:
            write_checkpoint(folder, self.ranks)
            write_files(folder, self.leaves)


@dataclass
class FakeCritic:
    """Advantages of each rank are 1 and 3, returns 4 and 8, values 3 and 5."""

    order: list[str] = field(default_factory=list)
    given: list[tuple[Sequence[Shard], Bodies, Estimates]] = field(default_factory=list)
    """What every update got."""
    references: References = ()
    """What the last estimate got."""
    saved: list[str] = field(default_factory=list)
    leaves: Sequence[str] = tuple(critic_files(shared=False, ranks=2))
    """Files that it writes into a checkpoint; those of a critic with its own trunk on as many ranks as `FakePolicy`."""

    def estimate(
        self, shards: Sequence[Shard], bodies: Bodies, references: References
    ) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        self.order.append("estimate")
        self.references = references
        sums = EstimateSums(2.0, 4.0, 10.0, 12.0, 80.0, 8.0, 10.0)
        return [Handle(f"estimate {rank}") for rank, _ in enumerate(shards)], EstimateSums.merge([sums] * len(shards))

    def begin_update(self, shards: Sequence[Shard], bodies: Bodies, estimates: Estimates) -> Handle[MetricSums]:
        self.order.append("critic begins")
        self.given.append((shards, bodies, estimates))
        return Handle("pending")

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        assert pending.place == "pending"
        self.order.append("critic ends")
        return MetricSums({"critic/loss": (3.0, 2.0)})

    def save(self, folder: Path) -> None:
        self.saved.append(folder.name)
        write_files(folder, self.leaves)


class Quiet:
    """A display that nobody looks at."""

    def stage(self, message: str) -> None: ...

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None: ...

    def eval(self, step: int, results: Mapping[str, float]) -> None: ...

    def warn(self, message: str) -> None: ...

    def note(self, message: str) -> None: ...

    def close(self, stopped: bool = False) -> None: ...


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
