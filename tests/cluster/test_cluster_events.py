"""The controller, its shell and the fleets with light actors: a worker dies, a member is silent, how much is sent."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cluster_line
import cluster_stand_ins
import numpy as np
import pytest
import ray
from cluster_line import Line, line, shard, until_lost
from cluster_stand_ins import ANNOUNCEMENT, REQUESTS, Ears, fleet, handles, makers, start, start_collator, tell
from ray._private.serialization import SerializationContext
from ray.actor import ActorMethod

from rlhf_dist.cluster.groups import CollatorProcess, ReferenceFleet, ScoringFleet
from rlhf_dist.cluster.processes import ProcessName, process_id
from rlhf_dist.cluster.waits import gather
from rlhf_dist.errors import ActorTimeout
from rlhf_dist.loop.events import Compared, Event, Kept, Lost, ReferenceKept, Scored, Undone
from rlhf_dist.types import Answered

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import controller as bench

workers, collator = cluster_stand_ins.workers, cluster_line.collator


@pytest.mark.parametrize("tokens", [3, 30_000])
def test_a_dead_workers_groups_begin_again_and_its_finished_ones_are_trained_on(
    workers: dict[str, Any], collator: Any, tokens: int
) -> None:
    """`tokens` of a response: few go inline through Ray, many through its object store."""
    doomed, other = start("doomed", tokens), start("other", tokens)
    tell(doomed, "holds 0/2")
    run = line({"rollout worker 0": doomed, "rollout worker 1": other}, workers["one"], collator, 6)
    run.shell.published(0)
    run.until_kept(5)
    made = dict(makers(run.heard))
    assert sorted(made) == [f"train/0/{i}/0" for i in (0, 1, 3, 4, 5)]
    assert sum(worker == "doomed" for worker in made.values()) == 2
    ray.kill(doomed)
    taken = run.shell.next_step()
    assert taken.attempts == (("0/0", 0), ("0/1", 0), ("0/2", 1), ("0/3", 0), ("0/4", 0), ("0/5", 0))
    (message,) = run.told
    assert message.startswith("rollout worker 0 died during 'generate': ")
    assert message.endswith("; 1 request of rollout worker 0 begin again")
    keys = [experience.key for experience in taken.experiences]
    (batch,) = run.bodies.batches([shard(6)], keys, False)
    found = gather({"batch": batch.place}, "fetch", 60)["batch"]
    lengths = [len(experience.prompt.messages[0].content) + tokens for experience in taken.experiences]
    assert np.diff(found.starts).tolist() == lengths
    assert [found.tokens[found.starts[i + 1] - 1] for i in range(6)] == [
        found.tokens[found.starts[i] + lengths[i] - tokens] + tokens - 1 for i in range(6)
    ]
    run.shell.forget(keys)


@pytest.mark.parametrize("tokens", [1, 60_000])
def test_tokens_that_died_with_their_worker_end_nothing(workers: dict[str, Any], collator: Any, tokens: int) -> None:
    """Nobody had taken them over. The worker's own death is told by its events."""
    doomed, ears = start("doomed", tokens), Ears()
    rollouts = fleet({"doomed": doomed}, ears)
    rollouts.submit("doomed", REQUESTS[:1])
    (answer,) = ears.hear(Answered, 1)
    ray.kill(doomed)
    while rollouts.serving():
        ears.inbox.pump()
    key = answer.key
    CollatorProcess("collator", collator, ears.inbox, timeout_s=60).keep({key: answer.body})
    ScoringFleet({"server": workers["one"]}, ears.inbox, timeout_s=60).submit("server", key, answer.body)
    ReferenceFleet({"server": workers["two"]}, ears.inbox, timeout_s=60).submit("server", key, answer.body, 1.0)
    ears.until(lambda: not ears.inbox._calls)
    # Ray may still have a copy of them on the node. What matters is that whoever was asked answers, and nothing raises.
    done = {Kept: "collator", Scored: "scoring", Compared: "reference"}
    heard = ears.of(*done, Undone)
    answered = [event.kind if isinstance(event, Undone) else done[type(event)] for event in heard]
    assert sorted(answered) == ["collator", "reference", "scoring"], heard


@contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that do nothing meanwhile."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("last", [Undone, Lost])
def test_a_group_whose_tokens_are_certainly_lost_begins_again(
    workers: dict[str, Any], tmp_path: Path, last: type[Event]
) -> None:
    """Collator and server are asked for tokens whose owner is dead. `last`: which of the two is heard of last."""
    collator, server, doomed = start_collator(tmp_path), start("server"), start("doomed", 30_000)
    signs = {"collator": collator.ready.remote(), "server": server.leave_signs.remote(tmp_path / "server.log")}
    gather(signs, "start", 120)
    pids = [process_id(ProcessName.of(name, str(tmp_path / f"{name}.log"))) for name in signs]
    run = line({"rollout worker 0": doomed, "rollout worker 1": workers["one"]}, server, collator, 2)
    later: list[Event] = []

    def hear(events: Sequence[Event]) -> None:
        """The loss of the worker waits until both have said that they could not get at its tokens."""
        found = list(events)
        if last is Lost:
            later.extend(event for event in found if isinstance(event, Lost))
            found = [event for event in found if not isinstance(event, Lost)]
        run.heard.extend(found)
        run.shell.hear(found)
        if later and len(undone(run)) == 2:
            run.heard.extend(later)
            run.shell.hear(later)
            later.clear()

    run.inbox.listen(hear)
    with stopped(*filter(None, pids)):
        run.shell.published(0)
        while len(answers := [event for event in run.heard if isinstance(event, Answered)]) < 2:
            run.inbox.pump()
        (lost,) = [event for event in answers if event.key == "train/0/0/0"]
        ray.kill(doomed)
        until_lost(lost.body)
        while not any(isinstance(event, Lost) for event in (*run.heard, *later)):
            run.inbox.pump()
    while len(undone(run)) < 2:  # or the group, sampled anew, might be taken before
        run.inbox.pump()
    taken = run.shell.next_step()
    assert sorted(undone(run)) == ["collator", "scoring"]
    assert [type(event) for event in run.heard if isinstance(event, Undone | Lost)][-1] is last
    assert (taken.attempts, taken.late) == ((("0/0", 1), ("0/1", 0)), 2 if last is Undone else 0)
    (message,) = run.told
    assert message.endswith("; 1 request of rollout worker 0 begin again")
    keys = [experience.key for experience in taken.experiences]
    assert keys == ["train/0/0/1", "train/0/1/0"]
    (batch,) = run.bodies.batches([shard(2)], keys, False)
    assert len(gather({"batch": batch.place}, "fetch", 60)["batch"].starts) == 3
    assert run.shell.open_groups() == {}
    run.shell.forget(keys)


def test_logprobs_that_died_with_their_server_are_told_of(workers: dict[str, Any], tmp_path: Path) -> None:
    """The collator had not begun to fetch them."""
    collator, doomed, ears = start_collator(tmp_path), start("doomed", 30_000), Ears()
    gather({"collator": collator.ready.remote(), "doomed": doomed.work.remote()}, "start", 120)
    servers = ReferenceFleet({"doomed": doomed, "one": workers["one"]}, ears.inbox, timeout_s=60)
    for name in ("doomed", "one"):
        servers.submit(name, name, handles(1)[0], 1.0)
    made = {answer.key: answer.reference.logprobs for answer in ears.hear(Compared, 2)}
    pid = process_id(ProcessName.of("collator", str(tmp_path / "collator.log")))
    with stopped(*filter(None, [pid])):
        CollatorProcess("collator", collator, ears.inbox, timeout_s=60).keep_references(made)
        ray.kill(doomed)
        until_lost(made["doomed"])
    assert {event.key: event.lost for event in ears.hear(ReferenceKept, 2)} == {"doomed": True, "one": False}


def undone(run: Line) -> list[str]:
    """Who could not get at tokens."""
    return [event.kind for event in run.heard if isinstance(event, Undone)]


@pytest.mark.parametrize(
    ("silent", "message"),
    [
        ("worker", r"^rollout worker 0 did not finish 'generate' in 0\.5 s \(rollout\.timeout_s\)$"),
        ("server", r"^scoring server 0 did not finish 'score' in 0\.5 s \(scoring\.timeout_s\)$"),
        ("collator", r"^collator did not finish 'keep' in 0\.5 s \(learner\.timeout_s\)$"),
    ],
)
def test_a_member_that_is_silent_is_named_with_its_limit(
    workers: dict[str, Any], collator: Any, silent: str, message: str
) -> None:
    worker, server = workers["one"], workers["two"]
    stand = start("three")
    tell({"worker": worker, "server": server, "collator": stand}[silent], "hangs")
    keeper = stand if silent == "collator" else collator
    run = line({"rollout worker 0": worker}, server, keeper, 1, limit_s=0.5)
    run.shell.published(0)
    with pytest.raises(ActorTimeout, match=message):
        run.shell.next_step()


class Scales:
    """Bytes that this process sends to others and gets from them, whatever the call, in Ray's own format."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.sent = self.got = 0
        self._seen: set[bytes] = set()
        self._serialize, self._read = SerializationContext.serialize, SerializationContext.deserialize_objects
        self._call = ActorMethod._remote
        patch.setattr(SerializationContext, "serialize", lambda *words: self._send(*words))
        patch.setattr(SerializationContext, "deserialize_objects", lambda *words: self._get(*words))
        patch.setattr(ActorMethod, "_remote", lambda *words, **named: self._ask(*words, **named))

    def _ask(self, method: ActorMethod, args: Any = (), *rest: Any, **named: Any) -> Any:
        self.sent += sum(len(one.binary()) for one in args if isinstance(one, ray.ObjectRef))
        return self._call(method, args, *rest, **named)

    def _send(self, context: SerializationContext, value: Any) -> Any:
        found = self._serialize(context, value)
        self.sent += found.total_bytes
        return found

    def _get(self, context: SerializationContext, objects: Any, refs: Any, *rest: Any) -> Any:
        for ref, (data, *_) in zip(refs, objects, strict=True):
            if data is not None and ref.binary() not in self._seen:  # an answer is read twice, and comes once
                self._seen.add(ref.binary())
                self.got += memoryview(data).nbytes
        return self._read(context, objects, refs, *rest)


def test_little_goes_through_the_controller_for_each_sample(
    workers: dict[str, Any], collator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole step but for the ranks' share, with 16 groups of 8 and 300 tokens a response."""
    groups_of, size = 16, 8
    long = {name: start(name, 300) for name in ("rollout worker 0", "rollout worker 1")}
    gather({name: actor.work.remote() for name, actor in long.items()}, "start", 120)
    scales = Scales(monkeypatch)
    run = line(long, workers["one"], collator, groups_of, size)
    run.rollouts.load_weights(ANNOUNCEMENT)
    run.shell.published(0)
    taken = run.shell.next_step()
    keys = [experience.key for experience in taken.experiences]
    (batch,) = run.bodies.batches([shard(groups_of, size)], keys, False)
    run.shell.forget(keys)
    samples = groups_of * size
    print(f"a sample: {scales.sent / samples:.0f} bytes sent, {scales.got / samples:.0f} got")
    assert scales.sent > 20 * samples and scales.got > 20 * samples, "the scales weigh"
    assert scales.sent + scales.got <= 300 * samples, (scales.sent, scales.got)
    monkeypatch.undo()
    assert len(gather({"batch": batch.place}, "fetch", 60)["batch"].starts) == samples + 1


def test_the_controller_benchmark(local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the Ray that is up; small. Speed is not asserted."""
    saved = tmp_path / "controller.json"
    assert bench.main(["--workers", "1", "3", "--steps", "2", "--runs", "1", "--out", str(saved)]) == 0
    found = json.loads(saved.read_text())
    assert [line["workers"] for line in found["lines"]] == [1, 3]
    assert found["messages"].keys() == {"post", "events", "score", "keep", "forget"}
    assert found["bytes_per_sample"] <= bench.TARGET_BYTES, found["messages"]
    assert "driver's CPU time" in capsys.readouterr().out
