"""Light stand-ins for the processes around the loop; they do as they are told and take no time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from quiet_display import Quiet as Quiet

from rlhf_dist.errors import ActorTimeout
from rlhf_dist.learner.checkpoint_files import checkpoint_files, critic_files
from rlhf_dist.learner.numbers_check import RankFault
from rlhf_dist.learner.shard import Shard
from rlhf_dist.learner.token_sums import Estimate, EstimateSums
from rlhf_dist.learner.witness import Seen
from rlhf_dist.loop.events import Compared, Event, Kept, MemberKind, ReferenceKept, Scored, TimedOut
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.loop.shell import Actors
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import (
    Answered,
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
    Unanswered,
)
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement

WORKER = "rollout worker 0"
PLAN = make_plan([("a", (4,), "float32")], 8)


def asked_for(body: Handle[Any]) -> tuple[str, int]:
    """(uid, samples) of a group that `FakeRollouts` made."""
    return body.place


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
    return GroupHead(uid, sampled + prompt, sampled, sampled, reasons, version, version, version, version)


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
        key=f"train/0/{number}/0",
        reference=None if kl is None else referenced(kl),
    )


def referenced(kl: list[float]) -> ReferenceHead:
    return ReferenceHead(np.array(kl, np.float32), np.zeros(len(kl), np.float32))


EXPERIENCES = [
    experience(0, 3, [2, 6], [1.0, 0.0]),
    experience(1, 5, [9, 1], [0.0, 0.0]),
    experience(2, 1, [4, 4], [0.0, 2.0]),
    experience(3, 2, [3, 3], [1.0, 0.0]),
]


def with_reference() -> list[Experience]:
    """The experiences with KL 0, 1, 2 ... nats, row by row."""
    return [replace(e, reference=referenced([2.0 * i, 2.0 * i + 1.0])) for i, e in enumerate(EXPERIENCES)]


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
class FakeInbox:
    """Hands over what was put into it; a second passes with each `pump`."""

    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    listener: Callable[[Sequence[Event]], None] = lambda events: None

    def listen(self, listener: Callable[[Sequence[Event]], None]) -> None:
        self.listener = listener

    def put(self, event: Event) -> None:
        self.events.append(event)

    def pump(self) -> None:
        events, self.events = self.events, []
        self.seconds += 1.0
        self.listener(events)

    def now(self) -> float:
        return self.seconds


@dataclass
class FakeRollouts:
    """Every response has 3 tokens; its handle is (uid, samples)."""

    drops: Sequence[str] = ()
    """Prompts that give no response: `0/1`, or `*` for all."""
    loses: Sequence[str] = ()
    """Prompts that never come back."""
    served: list[str] = field(default_factory=list)
    version: int = -1
    inbox: FakeInbox = field(default_factory=FakeInbox)
    order: list[str] = field(default_factory=list)
    """What was asked of it; a learner may have the same list."""
    awake: Sequence[str] = ()
    """What it says of workers when it is first asked to sleep."""

    def sleep(self) -> list[str]:
        self.order.append("sleep")
        return [] if "sleep" in self.order[:-1] else list(self.awake)

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        self.order.append("submit")
        for request in reversed(requests):
            self.served.append(request.uid)
            if request.uid in self.drops or "*" in self.drops:
                drop = DroppedPrompt(request.uid, "prompt_empty", "no known characters")
                self.inbox.put(Unanswered(request.key, drop))
            elif request.uid not in self.loses:
                head = head_of(request.uid, 2, [3] * request.n, ("stop",) * request.n, self.version)
                self.inbox.put(Answered(request.key, head, Handle((request.uid, request.n))))

    def cancel(self, worker: str, keys: Sequence[str]) -> None: ...

    def hand_over(self, worker: str, keys: Sequence[str]) -> None: ...

    def serving(self) -> tuple[str, ...]:
        return (WORKER,)

    def make_room(self) -> list[str]:
        return []

    def load_weights(self, announcement: Announcement) -> list[str]:
        self.order.append("load")
        self.version = announcement.version
        return []


@dataclass
class FakeScoring:
    """The first sample of a group is right, the others are wrong."""

    inbox: FakeInbox = field(default_factory=FakeInbox)

    def submit(self, server: str, key: str, body: Handle[Group]) -> None:
        self.inbox.put(Scored(server, key, self.scores(*asked_for(body))))

    def scores(self, uid: str, samples: int) -> Scores:
        total = np.zeros(samples, np.float32)
        total[0] = 1.0
        return scores_of(total, {"exact": total})


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
    inbox: FakeInbox = field(default_factory=FakeInbox)

    def submit(self, server: str, key: str, body: Handle[Group], temperature: float) -> None:
        uid, samples = asked_for(body)
        self.asked.append(((uid, samples), temperature))
        head = ReferenceHead(np.full(samples, self.kl, np.float32), np.full(samples, -3.0, np.float32))
        self.inbox.put(Compared(server, key, Referenced(head, Handle(f"reference {uid}"))))

    def update(self, announcement: Announcement, keep: float) -> None:
        self.moved.append((announcement.version, keep))

    def save(self, folder: Path) -> None:
        self.saved.append(folder.name)
        write_files(folder, self.leaves)


@dataclass
class FakeBodies:
    """Keeps everything; the batch of a rank is its shard."""

    kept: set[str] = field(default_factory=set)
    references: dict[str, Any] = field(default_factory=dict)
    given: list[tuple[Sequence[str], bool]] = field(default_factory=list)
    """Keys of every step, and whether their reference logprobs were wanted."""
    inbox: FakeInbox = field(default_factory=FakeInbox)

    def keep(self, bodies: Mapping[str, Handle[Group]]) -> None:
        for key in bodies:
            self.kept.add(key)
            self.inbox.put(Kept(key))

    def keep_references(self, logprobs: Mapping[str, Handle[np.ndarray]]) -> None:
        for key, handle in logprobs.items():
            self.references[key] = handle.place
            self.inbox.put(ReferenceKept(key))

    def keep_copy(self, key: str, body: Handle[Group]) -> None:
        raise NotImplementedError

    def recall(self, key: str) -> None:
        raise NotImplementedError

    def forget(self, keys: Sequence[str]) -> None:
        self.kept -= set(keys)

    def forget_all(self) -> None:
        self.kept.clear()
        self.references.clear()

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        assert set(keys) <= self.kept
        return [("abc",)] * len(keys)

    def save_step(self, path: Path, shards: Any, keys: Any, compared: bool, estimates: Any, facts: Any) -> None:
        assert set(keys) <= self.kept or not self.kept
        path.write_text(json.dumps(dict(facts)))

    def batches(self, shards: Sequence[Shard], keys: Sequence[str], compared: bool) -> list[Handle[Any]]:
        assert set(keys) <= self.kept or not self.kept
        self.given.append((keys, compared))
        return [Handle(shard) for shard in shards]


def silence(late: TimedOut) -> ActorTimeout:
    return ActorTimeout(f"{late.member} was silent for {late.limit_s:g} s")


def actors(
    rollouts: FakeRollouts | None = None,
    scoring: FakeScoring | None = None,
    reference: FakeReference | None = None,
    bodies: FakeBodies | None = None,
) -> Actors:
    """These, with one inbox."""
    inbox = FakeInbox()
    made = rollouts or FakeRollouts(), scoring or FakeScoring(), reference, bodies or FakeBodies()
    for part in made:
        if part is not None:
            part.inbox = inbox
    return Actors(*made, inbox, silence)


def members(reference: bool = False) -> Members:
    """One of each."""
    limits: dict[MemberKind, float] = dict.fromkeys(get_args(MemberKind), 50.0)
    references = ["reference"] if reference else []
    return Members([WORKER], ["scorer"], references, capacity=10**6, limits_s=limits, beat_s=0.0)


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
    given: list[tuple[Sequence[Shard], Estimates]] = field(default_factory=list)
    """What every update got; the batches of `FakeBodies` are the shards."""

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        self.order.append("policy")
        self.given.append((shards_of(batches), estimates))
        self.updates += 1
        if self.updates == self.fails_at:
            raise RuntimeError("the machine went down")
        return MetricSums({"policy/loss": (0.0, 1.0)}, {"rollout/logprob_diff_max": self.difference})

    def witnessed(self) -> Sequence[Seen]:
        raise NotImplementedError

    def faults(self) -> Mapping[str, RankFault]:
        raise NotImplementedError

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
    given: list[tuple[Sequence[Shard], Estimates]] = field(default_factory=list)
    """What every update got."""
    saved: list[str] = field(default_factory=list)
    leaves: Sequence[str] = tuple(critic_files(shared=False, ranks=2))
    """Files that it writes into a checkpoint; those of a critic with its own trunk on as many ranks as `FakePolicy`."""

    def estimate(self, batches: Batches) -> tuple[Sequence[Handle[Estimate]], EstimateSums]:
        self.order.append("estimate")
        sums = EstimateSums(2.0, 4.0, 10.0, 12.0, 80.0, 8.0, 10.0)
        return [Handle(f"estimate {rank}") for rank, _ in enumerate(batches)], EstimateSums.merge([sums] * len(batches))

    def begin_update(self, batches: Batches, estimates: Estimates) -> Handle[MetricSums]:
        self.order.append("critic begins")
        self.given.append((shards_of(batches), estimates))
        return Handle("pending")

    def finish_update(self, pending: Handle[MetricSums]) -> MetricSums:
        assert pending.place == "pending"
        self.order.append("critic ends")
        return MetricSums({"critic/loss": (3.0, 2.0)})

    def faults(self) -> Mapping[str, RankFault]:
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        self.saved.append(folder.name)
        write_files(folder, self.leaves)


def shards_of(batches: Batches) -> list[Any]:
    """What `FakeBodies` made batches of."""
    return [batch.place for batch in batches]


def lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
