"""Whole runs of the loop whose ranks are lost; processes are stand-ins, ledger, files and checkpoints are real."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import test_kept_state
from stand_ins import WORKER, FakeBodies, FakePolicy, FakeRollouts, head_of, lines
from test_loop_rl_training import ALL, CONFIG, PROMPTS, STEPS, close, wired

from rlhf_dist.config.schema import Config, LearnerConfig, LoopConfig
from rlhf_dist.errors import ActorLost, RanksLost, RanksSilent
from rlhf_dist.loop.events import Lost, Pulse
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.loop.ports import Batches, Estimates
from rlhf_dist.loop.rebuilding import train_to_the_end
from rlhf_dist.loop.rl_training import Run
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Answered, Handle, Request
from rlhf_dist.weights.receipts import Announcement

RANK = "learner rank 0"
WEIGHTS = "weights.txt"
Fault = Callable[[str, int], None]


@dataclass
class Learner(FakePolicy):
    """Its weights say what it has learnt, and in which order."""

    weights: int = 0
    fault: Fault = lambda call, weights: None
    """Called before each call, with its name and how many there were of it."""
    calls: list[str] = field(default_factory=list)

    def _begin(self, call: str) -> None:
        self.calls.append(call)
        self.fault(call, self.calls.count(call))

    def update(self, batches: Batches, estimates: Estimates) -> MetricSums:
        self._begin("update")
        text = repr([batch.place for batch in batches])
        self.weights = zlib.crc32(f"{self.weights} {text}".encode())
        return super().update(batches, estimates)

    def publish(self, version: int) -> Announcement:
        self._begin("publish")
        return super().publish(version)

    def save(self, folder: Path) -> None:
        super().save(folder)
        (folder / WEIGHTS).write_text(str(self.weights))
        self._begin("save")


@dataclass
class Ranks:
    """See `loop.ports.Ranks`; what comes before their return is `meanwhile`."""

    learner: Learner
    meanwhile: Callable[[], None] = lambda: None
    folders: list[Path | None] = field(default_factory=list)

    def rebuild(self, folder: Path | None) -> list[str]:
        self.folders.append(folder)
        self.meanwhile()
        self.learner.weights = 0 if folder is None else int((folder / WEIGHTS).read_text())
        return []


class Respawns:
    """See `loop.ports.Processes`."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def respawn(self, member: str) -> None:
        self.asked.append(member)


def healing(respawns: int = 3) -> Healing:
    kinds: Any = {RANK: "learner", WORKER: "rollout"}
    return Healing(kinds, respawns=respawns, window_s=600.0, pulse_s=1e9, start_s=1e9)


def once(call: str, number: int, error: Callable[[str], Exception] = RanksLost) -> Fault:
    def fault(found: str, count: int) -> None:
        if (found, count) == (call, number):
            raise error(f"{RANK} died during '{call}'")

    return fault


def config(checkpoint_every: int = 0, keep: int = 0, lag: int = 0) -> Config:
    loop = LoopConfig(steps=STEPS, prompts_per_step=PROMPTS, checkpoint_every=checkpoint_every, max_policy_lag=lag)
    return replace(CONFIG, loop=loop, learner=LearnerConfig(keep_state_every=keep))


@dataclass
class Ran:
    """A run with its parts, before it is trained."""

    run: Run
    learner: Learner
    ranks: Ranks

    @property
    def events(self) -> list[dict[str, Any]]:
        return lines(self.run.directory.events)

    def facts(self) -> list[dict[str, Any]]:
        return [event["facts"] for event in self.events if event["kind"] == "rebuilt"]


memory = test_kept_state.memory


@pytest.fixture
def make(tmp_path: Path, memory: Path) -> Iterator[Callable[..., Ran]]:
    made: list[Ran] = []

    def run_of(fault: Fault, chosen: Config, **parts: Any) -> Ran:
        learner = Learner(fault=fault)
        ranks = Ranks(learner)
        every = chosen.learner.keep_state_every
        kept = KeptState(every) if every else None
        parts = {"healing": healing()} | parts
        folder = tmp_path / str(len(made))
        made.append(Ran(wired(folder, chosen, policy=learner, ranks=ranks, kept=kept, **parts), learner, ranks))
        return made[-1]

    yield run_of
    for one in made:
        if one.run.kept is not None:
            one.run.kept.close()
        close(one.run)
    assert list(memory.iterdir()) == []


def whole(make: Callable[..., Ran], fault: Fault, chosen: Config, **parts: Any) -> Ran:
    """Trained to its end: nothing is lost or used twice, and no step is missing or twice in the metrics."""
    ran = make(fault, chosen, **parts)
    train_to_the_end(ran.run, None)
    proof = ran.run.ledger.proof()
    assert proof.holds and (proof.consumed, proof.in_flight) == (ALL, 0)
    assert [line["step"] for line in lines(ran.run.directory.metrics)] == list(range(STEPS + 1))
    return ran


def nothing(call: str, count: int) -> None:
    """No fault."""


FAULTS = [("update", 1), ("update", 3), ("publish", 1), ("publish", 3), ("save", 2)]


@pytest.mark.parametrize(("checkpoint_every", "keep"), [(0, 0), (2, 0), (0, 1), (2, 1)])
@pytest.mark.parametrize(("call", "number"), FAULTS)
def test_a_rank_lost_in_any_call_leads_to_the_same_weights(
    make: Callable[..., Ran], call: str, number: int, checkpoint_every: int, keep: int
) -> None:
    expected = whole(make, nothing, config()).learner.weights
    ran = whole(make, once(call, number), config(checkpoint_every, keep))
    if (call, checkpoint_every, keep) != ("save", 0, 0):  # there the last step's is the only one
        assert len(ran.ranks.folders) == 1
    assert ran.learner.weights == expected


@pytest.mark.parametrize(
    ("fault", "checkpoint_every", "keep", "from_step", "kept"),
    [
        (("update", 4), 0, 0, 0, False),
        (("update", 4), 2, 0, 2, False),
        (("update", 4), 0, 1, 3, True),
        (("update", 4), 2, 1, 3, True),
        (("update", 3), 2, 1, 2, False),
        (("save", 3), 0, 1, 2, True),
    ],
)
def test_the_newest_state_is_gone_on_from(
    make: Callable[..., Ran], fault: tuple[str, int], checkpoint_every: int, keep: int, from_step: int, kept: bool
) -> None:
    """A state that was being written when a rank was lost is none. What a checkpoint has is not kept besides."""
    ran = whole(make, once(*fault), config(checkpoint_every, keep))
    (found,) = ran.facts()
    assert (found["step"], found["kept"]) == (from_step, kept) and found["seconds"] >= 0
    (folder,) = ran.ranks.folders
    assert (None if folder is None else folder.name) == (f"step-{from_step}" if from_step else None)
    done = {"update": fault[1] - 1, "save": fault[1]}[fault[0]]
    updates = STEPS + done - from_step + (fault[0] == "update")
    assert ran.learner.calls.count("update") == updates, "no other step is made again"


def test_the_time_is_booked_to_the_step_after_it(make: Callable[..., Ran]) -> None:
    ran = make(once("update", 3), config(keep=1))
    ran.ranks.meanwhile = lambda: time.sleep(0.2)
    train_to_the_end(ran.run, None)
    found = [line.get("goodput/learner_recover", 0.0) for line in lines(ran.run.directory.metrics)]
    assert found[:3] == [0.0, 0.0, 0.0] and found[3] > 0.5 and found[4] == 0.0


@pytest.mark.parametrize("error", [RanksLost, RanksSilent])
def test_it_is_told_with_its_cause(make: Callable[..., Ran], error: type[Exception]) -> None:
    ran = whole(make, once("update", 3, error), config(2))
    (warning,) = [event for event in ran.events if event["kind"] == "warning"]
    assert warning["message"] == f"{RANK} died during 'update'; all ranks are started again, from step 2"
    (resumed,) = [event for event in ran.events if event["kind"] == "resume"]
    assert resumed["facts"]["prompts_reissued"] == PROMPTS


def test_a_rank_lost_while_groups_are_waited_for_is_heard_of_as_an_event(make: Callable[..., Ran]) -> None:
    ran = make(nothing, config(keep=1))
    inbox: Any = ran.run.actors.arrivals
    pump, lost = inbox.pump, list[int]()

    def lose_one() -> None:
        if ran.learner.calls.count("update") == 2 and not lost:
            lost.append(1)
            inbox.put(Pulse(RANK))
            inbox.put(Lost(RANK, f"{RANK} died: killed"))
        pump()

    inbox.pump = lose_one
    train_to_the_end(ran.run, None)
    assert len(ran.facts()) == 1 and ran.run.ledger.proof().holds
    assert ran.learner.weights == whole(make, nothing, config()).learner.weights


def test_one_that_is_lost_while_it_starts_is_started_again_within_the_budget(make: Callable[..., Ran]) -> None:
    ran = make(once("update", 2), config(keep=1))
    starts: list[int] = []

    def lost_twice() -> None:
        starts.append(1)
        if len(starts) < 3:
            raise RanksLost(f"{RANK} died during 'join'")

    ran.ranks.meanwhile = lost_twice
    train_to_the_end(ran.run, None)
    assert len(starts) == 3 and len(ran.facts()) == 1


def damaged(make: Callable[..., Ran], *steps: int) -> Ran:
    """A run with a checkpoint after each step, of which these are damaged when a rank is lost in step 4."""

    def fault(call: str, count: int) -> None:
        if (call, count) == ("update", 4):
            for step in steps:
                (ran.run.directory.checkpoints / f"step-{step}" / WEIGHTS).write_text("1")
            raise RanksLost(f"{RANK} died during 'update'")

    ran = make(fault, config(1))
    return ran


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(make: Callable[..., Ran]) -> None:
    expected = whole(make, nothing, config()).learner.weights
    ran = damaged(make, 3)
    train_to_the_end(ran.run, None)
    assert ran.learner.weights == expected and ran.run.ledger.proof().holds
    (told,) = [event["message"] for event in ran.events if "set aside" in event["message"]]
    assert f"step-3/{WEIGHTS}" in told and told.endswith("; step-2 is used, and step-3 is set aside")
    assert [facts["step"] for facts in ran.facts()] == [2]
    assert (ran.run.directory.checkpoints / "step-3.set-aside").exists()


def test_where_all_checkpoints_are_damaged_the_run_ends(make: Callable[..., Ran]) -> None:
    ran = damaged(make, 2, 3)
    with pytest.raises(
        ActorLost, match=rf"died during 'update'; the ranks cannot be started again: .*step-3/{WEIGHTS}"
    ):
        train_to_the_end(ran.run, None)


def test_one_that_is_lost_too_often_ends_the_run_with_a_report(make: Callable[..., Ran]) -> None:
    def always(call: str, count: int) -> None:
        if call == "update" and count > 1:
            raise RanksLost(f"{RANK} died during 'update'")

    ran = make(always, config(keep=1), healing=healing(respawns=2))
    with pytest.raises(ActorLost, match="the learner was lost 3 times within 600 s") as caught:
        train_to_the_end(ran.run, None)
    assert str(caught.value).count("died during 'update'") == 3 and "at most 2 times (faults.respawns)" in str(
        caught.value
    )


def test_ranks_that_nobody_can_start_again_end_the_run(make: Callable[..., Ran]) -> None:
    ran = make(once("update", 2), config(), healing=Healing({}, respawns=1, window_s=1, pulse_s=1, start_s=1))
    with pytest.raises(RanksLost, match="died during 'update'"):
        train_to_the_end(ran.run, None)
    assert ran.ranks.folders == []


def test_a_worker_lost_meanwhile_is_started_again(make: Callable[..., Ran]) -> None:
    ran = make(once("update", 3), config(keep=1))
    inbox: Any = ran.run.actors.arrivals
    respawns = Respawns()
    ran = Ran(replace(ran.run, actors=replace(ran.run.actors, processes=respawns)), ran.learner, ran.ranks)

    def lose_it() -> None:
        inbox.put(Pulse(WORKER))
        inbox.put(Lost(WORKER, "gone"))
        inbox.pump()

    ran.ranks.meanwhile = lose_it
    inbox.seconds = 0.0
    pump = inbox.pump

    def limited() -> None:
        assert inbox.seconds < 100, "nobody is there to sample"
        pump()

    inbox.pump = limited
    with pytest.raises(AssertionError, match="nobody is there to sample"):
        train_to_the_end(ran.run, None)
    assert respawns.asked == [WORKER]


@dataclass
class LateRollouts(FakeRollouts):
    """Answers of the learner's first life come in its second, too, and say something else."""

    old: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        self.keys += [request.key for request in requests]
        for request in self.old:
            head = head_of(request.uid, 2, [7] * request.n, ("stop",) * request.n, self.version)
            self.inbox.put(Answered(request.key, head, Handle((request.uid, request.n))))
        super().submit(worker, requests)

    def cancel(self, worker: str, keys: Sequence[str]) -> None:
        self.cancelled += keys


class Training(tuple[str, ...]):
    """All prompts of the training data."""

    def __contains__(self, uid: object) -> bool:
        return not str(uid).startswith("eval")


def test_what_an_earlier_life_asked_for_is_ended_and_its_answers_change_nothing(make: Callable[..., Ran]) -> None:
    rollouts = LateRollouts()
    bodies = FakeBodies()
    ran = make(nothing, config(keep=1, lag=1), rollouts=rollouts, bodies=bodies)
    seen: list[Request] = []
    submit = FakeRollouts.submit

    def remember(self: FakeRollouts, worker: str, requests: Sequence[Request]) -> None:
        seen.extend(requests)
        submit(self, worker, requests)

    held: list[set[str]] = []

    def lose_one(call: str, count: int) -> None:
        if (call, count) == ("update", 2):
            rollouts.loses = Training()
        if (call, count) == ("update", 3):
            rollouts.loses = ()
            rollouts.old = [request for request in seen if request.purpose == "train"]
            raise RanksLost("gone")

    ran.learner.fault = lose_one
    ran.ranks.meanwhile = lambda: held.append(set(bodies.kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeRollouts, "submit", remember)
        train_to_the_end(ran.run, None)
    assert held == [set()], "the collator has nothing of the time before"
    assert rollouts.cancelled, "groups were under way for the next step"
    assert len(rollouts.keys) == len(set(rollouts.keys)), "no two requests have a key in common"
    proof = ran.run.ledger.proof()
    assert proof.holds and proof.tokens == proof.consumed * 8 * 3, "none of the late answers, which are longer"
    assert sum(line.get("goodput/late_events", 0) for line in lines(ran.run.directory.metrics)) > 0
