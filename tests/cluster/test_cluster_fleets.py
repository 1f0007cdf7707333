"""The fleets of a PPO run: policy, critic, reference and scoring, as light actors in a real Ray."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cluster_stand_ins
import pytest
import ray
from cluster_stand_ins import ANNOUNCEMENT, Ears, fleet, handles, serve, start, tell

from rlhf_dist.cluster import actors, join_probe, processes
from rlhf_dist.cluster.address import check_cluster
from rlhf_dist.cluster.groups import (
    CriticGroup,
    PolicyCreditGroup,
    PolicyGroup,
    ReferenceFleet,
    ScoringFleet,
)
from rlhf_dist.cluster.processes import ProcessName
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import ClusterConfig
from rlhf_dist.errors import ActorLost, ActorTimeout, ResourceError, RunError, WeightSyncError
from rlhf_dist.learner.token_sums import EstimateSums, Whitening
from rlhf_dist.loop.events import Compared, Lost, Scored
from rlhf_dist.loop.ports import NO_ESTIMATES, Estimates
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import Handle

workers = cluster_stand_ins.workers


def put(*records: float) -> list[Handle[Any]]:
    return [Handle(ray.put(record)) for record in records]


def test_policy_ranks_each_get_their_batch_and_credit_and_report_once(workers: dict[str, Any]) -> None:
    group = PolicyGroup(workers, timeout_s=30)
    assert group.ranks == 2
    assert group.update(put(2.0, 4.0), NO_ESTIMATES).values() == {"policy/loss": 3.0}
    estimates = Estimates(put(5.0, 9.0), Whitening(1.0, 1.0), {})
    assert group.update(put(2.0, 4.0), estimates).values() == {"policy/loss": 3.0, "credit": 6.0}
    assert group.publish(9).version == 9


def test_ranks_that_share_rows_get_the_same_batch_and_its_credit_counts_once(workers: dict[str, Any]) -> None:
    estimates = Estimates(put(5.0), Whitening(1.0, 1.0), {})
    found = PolicyGroup(workers, timeout_s=30).update(put(2.0), estimates)
    assert (found.sums["policy/loss"], found.sums["credit"]) == ((4.0, 2.0), (8.0, 2.0))
    group, batches = CriticGroup(workers, timeout_s=30), put(2.0)
    made, sums = group.estimate(batches)
    assert (len(made), sums) == (1, EstimateSums(1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    pending = group.begin_update(batches, Estimates(made, Whitening(0.0, 1.0), {}))
    assert group.finish_update(pending).sums["critic/loss"] == (44.0, 2.0)


def test_neighbours_share_rows(workers: dict[str, Any]) -> None:
    one, two = workers.values()
    group, batches = CriticGroup({"0": one, "1": two, "2": one, "3": two}, timeout_s=30), put(2.0, 4.0)
    made, sums = group.estimate(batches)
    assert sums == EstimateSums(2.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert [ray.get(handle.place, timeout=30) for handle in made] == [20.0, 40.0]
    pending = group.begin_update(batches, Estimates(made, Whitening(0.0, 1.0), {}))
    learnt = {name: ray.get(call, timeout=30).values()["critic/loss"] for name, call in pending.place.items()}
    assert learnt == {"0": 22.0, "1": 22.0, "2": 44.0, "3": 44.0}


def test_a_critic_estimates_and_learns_its_own_batches(workers: dict[str, Any], tmp_path: Path) -> None:
    group, batches = CriticGroup(workers, timeout_s=30), put(2.0, 4.0)
    found, sums = group.estimate(batches)
    assert sums == EstimateSums(2.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert all(isinstance(handle.place, ray.ObjectRef) for handle in found), "the arrays stay away"
    pending = group.begin_update(batches, Estimates(found, Whitening(0.0, 1.0), {}))
    assert list(pending.place) == ["one", "two"]
    assert group.finish_update(pending).values() == {"critic/loss": (22.0 + 44.0) / 2}
    group.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["critic-one", "critic-two"]


def test_events_are_handed_over_while_ranks_learn(workers: dict[str, Any]) -> None:
    ears = Ears()
    tell(workers["two"], "sleeps")
    ScoringFleet({"one": workers["one"]}, ears.inbox, timeout_s=30).submit("one", "key", handles(1)[0])
    group = CriticGroup({"two": workers["two"]}, timeout_s=30, waits=ears.inbox.wait)
    group.estimate(put(1.0))
    assert [event.key for event in ears.of(Scored)] == ["key"]


def test_a_critic_that_sleeps_is_not_waited_for_while_the_policy_learns(workers: dict[str, Any]) -> None:
    group = CriticGroup(workers, timeout_s=0.7)
    tell(workers["two"], "sleeps")
    begun = time.monotonic()
    estimates = Estimates(put(1.0, 1.0), Whitening(0.0, 1.0), {})
    pending = group.begin_update(put(1.0, 1.0), estimates)
    assert time.monotonic() - begun < 1.0, "it only begins"
    message = r"^two did not finish 'update_critic' in 0\.7 s \(learner\.timeout_s\)$"
    with pytest.raises(ActorTimeout, match=message):
        group.finish_update(pending)


def test_a_critic_that_takes_turns_is_done_before_the_policy_begins(workers: dict[str, Any]) -> None:
    """On the same ranks its work would count against the limit of the policy's."""
    group, batches = CriticGroup(workers, timeout_s=0.7, in_turn=True), put(2.0, 4.0)
    estimates = Estimates(put(20.0, 40.0), Whitening(0.0, 1.0), {})
    pending = group.begin_update(batches, estimates)
    for worker in workers.values():
        tell(worker, "breaks")
    assert group.finish_update(pending).values() == {"critic/loss": 33.0}, "nobody is asked any more"
    tell(workers["one"], "right")
    tell(workers["two"], "sleeps")
    with pytest.raises(ActorTimeout, match=r"^two did not finish 'update_critic' in 0\.7 s"):
        group.begin_update(batches, estimates)


def test_a_critic_rank_that_dies_is_named(workers: dict[str, Any]) -> None:
    doomed = start("doomed")
    tell(doomed, "dies")
    group = CriticGroup({"critic rank 0": workers["one"], "critic rank 1": doomed}, timeout_s=30)
    with pytest.raises(ActorLost, match=r"^critic rank 1 died during 'estimate': .*logs/critic-rank-1\.log"):
        group.estimate(put(1.0, 2.0))


def test_a_head_on_the_policys_trunk_has_nothing_to_do_of_its_own(workers: dict[str, Any], tmp_path: Path) -> None:
    group = PolicyCreditGroup(workers, timeout_s=30)
    assert group.estimate(put(2.0, 4.0))[1].advantages == 6.0
    assert group.finish_update(group.begin_update([], NO_ESTIMATES)) == MetricSums()
    group.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scores_are_those_of_the_server_that_was_asked(workers: dict[str, Any]) -> None:
    ears = Ears()
    scoring = ScoringFleet(workers, ears.inbox, timeout_s=30)
    for name, handle in zip(("one", "two", "two"), handles(3), strict=True):
        scoring.submit(name, f"for {name}", handle)
    found = ears.hear(Scored, 3)
    assert sorted((event.server, event.key, float(event.scores.total[0])) for event in found) == [
        ("one", "for one", 1.0),
        ("two", "for two", 2.0),
        ("two", "for two", 2.0),
    ]


def test_a_reference_compares_at_the_samplers_temperature_and_logprobs_stay_there(workers: dict[str, Any]) -> None:
    ears = Ears()
    references = ReferenceFleet(workers, ears.inbox, timeout_s=30)
    for name, handle in zip(workers, handles(2), strict=True):
        references.submit(name, name, handle, 0.7)
    found = {event.key: event.reference for event in ears.hear(Compared, 2)}
    assert all(isinstance(referenced.logprobs.place, ray.ObjectRef) for referenced in found.values())
    assert {key: referenced.head.kl.tolist() for key, referenced in found.items()} == {
        "one": [0.7] * 2,
        "two": [0.7] * 2,
    }
    arrays = gather({key: referenced.logprobs.place for key, referenced in found.items()}, "fetch", 30)
    assert {key: array.tolist() for key, array in arrays.items()} == {"one": [1.0, 1.0], "two": [2.0, 2.0]}


def asked(workers: dict[str, Any], bad: Any, kind: Any) -> tuple[Ears, str]:
    """Two servers, of which the second is bad, are asked for a group each; what they are asked for."""
    ears = Ears()
    fleet_of = kind({"server 0": workers["one"], "server 1": bad}, ears.inbox, timeout_s=30.0)
    words, verb = ((0.7,), "compare") if kind is ReferenceFleet else ((), "score")
    for i, handle in enumerate(handles(2)):
        fleet_of.submit(f"server {i}", f"train/0/{i}/0", handle, *words)
    return ears, f"{verb} train/0/1/0"


@pytest.mark.parametrize("kind", [ReferenceFleet, ScoringFleet])
def test_a_server_that_fails_is_named_with_the_request(workers: dict[str, Any], kind: Any) -> None:
    tell(workers["two"], "breaks")
    ears, what = asked(workers, workers["two"], kind)
    with pytest.raises(RunError) as caught:
        ears.until(lambda: False, 60)
    assert str(caught.value).startswith(f"server 1 failed in '{what}': IndexError: list index out of range")


@pytest.mark.parametrize("kind", [ReferenceFleet, ScoringFleet])
def test_a_server_that_dies_is_lost_with_the_request(workers: dict[str, Any], kind: Any) -> None:
    doomed = start("doomed")
    tell(doomed, "dies")
    ears, what = asked(workers, doomed, kind)
    (lost,) = ears.hear(Lost, 1)
    assert lost.member == "server 1" and lost.why.startswith(f"server 1 died during '{what}': ")


def test_a_reference_that_moves_proves_what_it_took(workers: dict[str, Any], tmp_path: Path) -> None:
    fleet_of = ReferenceFleet(workers, Ears().inbox, timeout_s=30, moves=True)
    fleet_of.update(ANNOUNCEMENT, 0.5)
    tell(workers["two"], "lies")
    with pytest.raises(WeightSyncError, match=r"^two, version 3: .*another hash"):
        fleet_of.update(ANNOUNCEMENT, 0.5)
    fleet_of.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["reference-one"], "one copy is enough"
    ReferenceFleet(workers, Ears().inbox, timeout_s=30).save(tmp_path / "not there")


def test_a_failing_reference_quarantines_no_rollout_worker(workers: dict[str, Any]) -> None:
    ears = Ears()
    rollouts = fleet(workers, ears)
    assert rollouts.load_weights(ANNOUNCEMENT) == []
    tell(workers["two"], "lies")
    with pytest.raises(WeightSyncError):
        ReferenceFleet(workers, Ears().inbox, timeout_s=30).update(ANNOUNCEMENT, 0.0)
    assert serve(rollouts, ears) == {"one", "two"}


def test_nobody_else_can_enter_the_folder_of_the_session(local_ray: None) -> None:
    session = Path(ray._private.worker._global_node.get_temp_dir_path())  # pyright: ignore[reportAttributeAccessIssue]
    assert session.parent.stat().st_mode & 0o777 == 0o700


def test_a_cluster_that_is_there_can_be_joined_and_one_with_another_token_not(
    local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ray.get_runtime_context().gcs_address
    assert join_probe.problem(where, 30.0) == ""
    monkeypatch.setenv("RAY_ADDRESS", where)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-token" * 3)
    with pytest.raises(ResourceError, match=rf"RAY_ADDRESS={where}: the cluster rejects the token; .* RAY_AUTH_TOKEN"):
        check_cluster(ClusterConfig(start_timeout_s=60))


@dataclass
class Push:
    """A fleet of one worker that answers and one whose process can be stopped."""

    workers: dict[str, Any]
    ears: Ears
    fleet: RolloutFleet
    pid: int
    version: int = 0

    def push(self) -> list[str]:
        self.version += 1
        return self.fleet.load_weights(replace(ANNOUNCEMENT, version=self.version))

    def serve(self) -> set[str]:
        return serve(self.fleet, self.ears)

    def answered(self) -> None:
        """Wait until the one that was stopped has answered what it was asked."""
        calls = [standing.call for standing in self.fleet._standings.values() if standing.call is not None]
        assert not calls or ray.wait(calls, timeout=60)[0]


@pytest.fixture
def stoppable(workers: dict[str, Any], tmp_path: Path) -> Iterator[Push]:
    log = tmp_path / "stoppable.log"
    actor = start("stoppable")
    pid = gather({"it": actor.leave_signs.remote(log)}, "leave signs", 120)["it"]
    both = {"one": workers["one"], ProcessName.of("stoppable", str(log)): actor}
    ears = Ears()
    yield Push(both, ears, fleet(both, ears, sync_timeout_s=0.6), pid)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_stopped_worker_is_waited_for_once_and_then_given_up(stoppable: Push) -> None:
    assert stoppable.push() == [] and stoppable.serve() == {"one", "stoppable"}
    os.kill(stoppable.pid, signal.SIGSTOP)
    (first,) = stoppable.push()
    assert first == (
        "stoppable did not load version 2 in 0.6 s (weights.timeout_s): it is stopped (state T): something outside the "
        "run stopped it; it serves no tokens and is not waited for until a push succeeds"
    )
    begun = time.monotonic()
    (second,) = stoppable.push()
    (third,) = stoppable.push()
    assert time.monotonic() - begun < 0.6, "nobody waited"
    assert second.startswith("stoppable still has not loaded 2: it is stopped")
    assert third.endswith("; it missed 3 pushes in a row; it is given up, 1 rollout worker is left")
    end = time.monotonic() + 20
    while (found := processes.stat(stoppable.pid)) and found.state != "Z" and time.monotonic() < end:
        time.sleep(0.02)
    assert found is None or found.state == "Z", "it is killed"
    assert stoppable.push() == [] and stoppable.serve() == {"one"}


def test_workers_that_may_hold_all_of_the_memory_leave_room_for_the_next_version(
    stoppable: Push, workers: dict[str, Any]
) -> None:
    """One is stopped in version 1, which is in the first buffer, the other sleeps in version 2, in the second."""
    for name in ("one", "stoppable"):  # that fleet's messages have numbers of their own
        gather({name: stoppable.workers[name].anew.remote()}, "be new", 30)
    three = fleet(stoppable.workers | {"two": workers["two"]}, stoppable.ears, sync_timeout_s=0.6)
    assert three.load_weights(replace(ANNOUNCEMENT, version=0)) == [] and three.make_room() == []
    os.kill(stoppable.pid, signal.SIGSTOP)
    assert len(three.load_weights(replace(ANNOUNCEMENT, version=1, offset=0))) == 1
    assert three.make_room() == [], "only one of the buffers may be held"
    tell(workers["one"], "sleeps")
    assert len(three.load_weights(replace(ANNOUNCEMENT, version=2, offset=4096))) == 2
    (given_up,) = three.make_room()
    assert given_up.startswith("stoppable still has not loaded 1: it is stopped")
    assert given_up.endswith("as another worker holds the rest; it is given up, 2 rollout workers are left")
    assert three.make_room() == []


def test_a_worker_that_goes_on_comes_back_without_being_waited_for(stoppable: Push) -> None:
    os.kill(stoppable.pid, signal.SIGSTOP)
    assert len(stoppable.push()) == 1
    os.kill(stoppable.pid, signal.SIGCONT)
    stoppable.answered()  # for version 1, late: it may serve that
    assert stoppable.serve() == {"one", "stoppable"}
    assert stoppable.push() == [] and stoppable.serve() == {"one", "stoppable"}


def test_a_late_receipt_is_not_taken_for_the_version_that_is_pushed_now(stoppable: Push) -> None:
    os.kill(stoppable.pid, signal.SIGSTOP)
    assert [len(stoppable.push()) for _ in range(2)] == [1, 1]
    os.kill(stoppable.pid, signal.SIGCONT)
    stoppable.answered()
    assert stoppable.serve() == {"one"}, "its receipt is for version 1, and 2 is served"
    assert stoppable.push() == [], "version 2 is counted already"
    stoppable.answered()
    assert stoppable.serve() == {"one", "stoppable"}
    assert stoppable.push() == []


def test_when_the_only_worker_is_stopped_it_is_given_up(stoppable: Push) -> None:
    (name, standing) = list(stoppable.fleet._standings.items())[1]
    stoppable.fleet = fleet({name: standing.worker}, stoppable.ears, sync_timeout_s=0.3)
    os.kill(stoppable.pid, signal.SIGSTOP)
    (told,) = stoppable.push()
    assert told.startswith("stoppable did not load version 1 in ")
    assert "no rollout worker holds the published weights" in told and told.endswith("0 rollout workers are left")


def test_a_rank_that_is_stopped_is_closed_with_the_others(stoppable: Push, workers: dict[str, Any]) -> None:
    (name, standing) = list(stoppable.fleet._standings.items())[1]
    os.kill(stoppable.pid, signal.SIGSTOP)
    actors.close_all({"one": workers["one"], name: standing.worker}, 0.3)
    found = processes.stat(stoppable.pid)
    assert found is None or found.state in ("Z", "X")
