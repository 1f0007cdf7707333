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
from cluster_stand_ins import ANNOUNCEMENT, REQUESTS, handles, start, tell

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
from rlhf_dist.learner.shard import EstimateSums, Whitening
from rlhf_dist.loop.ports import NO_ESTIMATES, Estimates
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import DroppedPrompt, Handle

machine, pair, workers = cluster_stand_ins.machine, cluster_stand_ins.pair, cluster_stand_ins.workers


def put(*records: float) -> list[Handle[Any]]:
    return [Handle(ray.put(record)) for record in records]


def test_policy_ranks_each_get_their_shard_and_credit_and_report_once(workers: dict[str, Any]) -> None:
    group = PolicyGroup(workers, timeout_s=30)
    assert group.ranks == 2
    merged = group.update([2.0, 4.0], handles(3), [], NO_ESTIMATES)  # type: ignore[list-item]
    assert merged.values() == {"policy/loss": 3.0, "tokens": 6.0, "references": 0.0}
    references = put(10.0, 20.0)
    estimates = Estimates(put(5.0, 9.0), Whitening(1.0, 1.0), {})
    merged = group.update([2.0, 4.0], handles(3), references, estimates)  # type: ignore[list-item]
    assert merged.values() == {"policy/loss": 3.0, "tokens": 6.0, "references": 30.0, "credit": 6.0}
    assert group.publish(9).version == 9


def test_a_critic_estimates_and_learns_its_own_shards(workers: dict[str, Any], tmp_path: Path) -> None:
    group, rollouts = CriticGroup(workers, timeout_s=30), handles(3)
    shards: Any = [2.0, 4.0]
    found, sums = group.estimate(shards, rollouts, put(1.0))
    assert sums == EstimateSums(2.0, 6.0, 6.0, 2.0, 0.0, 0.0, 0.0), "3 groups and 1 reference on each rank"
    assert all(isinstance(handle.place, ray.ObjectRef) for handle in found), "the arrays stay away"
    pending = group.begin_update(shards, rollouts, Estimates(found, Whitening(0.0, 1.0), {}))
    assert list(pending.place) == ["one", "two"]
    assert group.finish_update(pending).values() == {"critic/loss": (22.0 + 44.0) / 2, "groups": 3.0}
    group.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["critic-one", "critic-two"]


def test_a_critic_that_sleeps_is_not_waited_for_while_the_policy_learns(workers: dict[str, Any]) -> None:
    group, rollouts = CriticGroup(workers, timeout_s=0.7), handles(1)
    tell(workers["two"], "sleeps")
    begun = time.monotonic()
    estimates = Estimates(put(1.0, 1.0), Whitening(0.0, 1.0), {})
    pending = group.begin_update([1.0, 1.0], rollouts, estimates)  # type: ignore[list-item]
    assert time.monotonic() - begun < 1.0, "it only begins"
    message = r"^two did not finish 'update_critic' in 0\.7 s \(learner\.timeout_s\)$"
    with pytest.raises(ActorTimeout, match=message):
        group.finish_update(pending)


def test_a_critic_that_takes_turns_is_done_before_the_policy_begins(workers: dict[str, Any]) -> None:
    """On the same ranks its work would count against the limit of the policy's."""
    group, shards = CriticGroup(workers, timeout_s=0.7, in_turn=True), [2.0, 4.0]
    estimates = Estimates(put(20.0, 40.0), Whitening(0.0, 1.0), {})
    pending = group.begin_update(shards, handles(1), estimates)  # type: ignore[arg-type]
    for worker in workers.values():
        tell(worker, "breaks")
    assert group.finish_update(pending).values() == {"critic/loss": 33.0, "groups": 1.0}, "nobody is asked any more"
    tell(workers["one"], "right")
    tell(workers["two"], "sleeps")
    with pytest.raises(ActorTimeout, match=r"^two did not finish 'update_critic' in 0\.7 s"):
        group.begin_update(shards, handles(1), estimates)  # type: ignore[arg-type]


def test_a_critic_rank_that_dies_is_named(workers: dict[str, Any]) -> None:
    doomed = start("doomed")
    tell(doomed, "dies")
    group = CriticGroup({"critic rank 0": workers["one"], "critic rank 1": doomed}, timeout_s=30)
    with pytest.raises(ActorLost, match=r"^critic rank 1 died during 'estimate': .*logs/critic-rank-1\.log"):
        group.estimate([1.0, 2.0], handles(1), [])  # type: ignore[list-item]


def test_a_head_on_the_policys_trunk_has_nothing_to_do_of_its_own(workers: dict[str, Any], tmp_path: Path) -> None:
    group = PolicyCreditGroup(workers, timeout_s=30)
    assert group.estimate([2.0, 4.0], handles(1), [])[1].advantages == 6.0  # type: ignore[list-item]
    assert group.finish_update(group.begin_update([], [], NO_ESTIMATES)) == MetricSums()
    group.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_groups_are_dealt_out_to_scoring_servers_in_turn(workers: dict[str, Any]) -> None:
    scoring = ScoringFleet(workers, timeout_s=30)
    found = scoring.gather({str(i): scoring.submit(handle) for i, handle in enumerate(handles(5))})
    assert [found[str(i)].total[0] for i in range(5)] == [1.0, 2.0, 1.0, 2.0, 1.0]


def test_groups_are_dealt_out_to_reference_servers_and_logprobs_stay_there(workers: dict[str, Any]) -> None:
    fleet_of = ReferenceFleet(workers, timeout_s=30)
    found = fleet_of.gather({str(i): fleet_of.submit(handle, 0.7) for i, handle in enumerate(handles(4))})
    assert all(isinstance(referenced.logprobs.place, ray.ObjectRef) for referenced in found.values())
    assert [found[str(i)].head.kl.tolist() for i in range(4)] == [[0.7, 0.7]] * 4
    arrays = gather({uid: referenced.logprobs.place for uid, referenced in found.items()}, "fetch", 30)
    assert [arrays[str(i)].tolist() for i in range(4)] == [[1.0, 1.0], [2.0, 2.0]] * 2


@pytest.mark.parametrize("kind", [ReferenceFleet, ScoringFleet])
@pytest.mark.parametrize(
    ("mode", "error", "why"),
    [
        ("sleeps", ActorTimeout, "did not finish 'VERB prompt 0/1' in 0.7 s (scoring.timeout_s)"),
        ("breaks", RunError, "failed in 'VERB prompt 0/1': IndexError: list index out of range"),
        ("dies", ActorLost, "died during 'VERB prompt 0/1': "),
    ],
)
def test_a_server_that_fails_is_named_with_the_prompt(
    workers: dict[str, Any], kind: Any, mode: str, error: type[Exception], why: str
) -> None:
    bad = start("doomed") if mode == "dies" else workers["two"]
    tell(bad, mode)
    fleet_of = kind({"server 0": workers["one"], "server 1": bad}, timeout_s=0.7 if mode == "sleeps" else 30.0)
    words, verb = ((0.7,), "compare") if kind is ReferenceFleet else ((), "score")
    pending = {f"0/{i}": fleet_of.submit(handle, *words) for i, handle in enumerate(handles(2))}
    with pytest.raises(error) as caught:
        fleet_of.gather(pending)
    assert str(caught.value).startswith("server 1 " + why.replace("VERB", verb)), str(caught.value)


def test_a_reference_that_moves_proves_what_it_took(workers: dict[str, Any], tmp_path: Path) -> None:
    fleet_of = ReferenceFleet(workers, timeout_s=30, moves=True)
    fleet_of.update(ANNOUNCEMENT, 0.5)
    tell(workers["two"], "lies")
    with pytest.raises(WeightSyncError, match=r"^two, version 3: .*another hash"):
        fleet_of.update(ANNOUNCEMENT, 0.5)
    fleet_of.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["reference-one"], "one copy is enough"
    ReferenceFleet(workers, timeout_s=30).save(tmp_path / "not there")


def test_a_failing_reference_quarantines_no_rollout_worker(workers: dict[str, Any]) -> None:
    rollouts = RolloutFleet(workers, timeout_s=30, sync_timeout_s=30)
    assert rollouts.load_weights(ANNOUNCEMENT) == []
    tell(workers["two"], "lies")
    with pytest.raises(WeightSyncError):
        ReferenceFleet(workers, timeout_s=30).update(ANNOUNCEMENT, 0.0)
    served = [item for item in rollouts.generate(REQUESTS[:4]) if not isinstance(item, DroppedPrompt)]
    assert {head.worker for head, _ in served} == {"one", "two"}


def test_nobody_else_can_enter_the_folder_of_the_session(machine: Any) -> None:
    session = Path(ray._private.worker._global_node.get_temp_dir_path())  # pyright: ignore[reportAttributeAccessIssue]
    assert session.parent.stat().st_mode & 0o777 == 0o700


def test_a_cluster_that_is_there_can_be_joined_and_one_with_another_token_not(
    machine: Any, monkeypatch: pytest.MonkeyPatch
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
    fleet: RolloutFleet
    pid: int
    version: int = 0

    def push(self) -> list[str]:
        self.version += 1
        return self.fleet.load_weights(replace(ANNOUNCEMENT, version=self.version))

    def serve(self) -> set[str]:
        served = self.fleet.generate(REQUESTS[:4])
        return {item[0].worker for item in served if not isinstance(item, DroppedPrompt)}

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
    yield Push(both, RolloutFleet(both, timeout_s=30, sync_timeout_s=0.6), pid)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_stopped_worker_is_waited_for_once_and_then_given_up(stoppable: Push) -> None:
    assert stoppable.push() == [] and stoppable.serve() == {"one", "stoppable"}
    os.kill(stoppable.pid, signal.SIGSTOP)
    (first,) = stoppable.push()
    assert first == (
        "stoppable did not load version 2 in 0.6 s (weights.timeout_s): it is stopped (state T; "
        f"`kill -CONT {stoppable.pid}` lets it go on); it serves no tokens and is not waited for until a push succeeds"
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
    fleet = RolloutFleet(stoppable.workers | {"two": workers["two"]}, timeout_s=30, sync_timeout_s=0.6)
    assert fleet.load_weights(replace(ANNOUNCEMENT, version=0)) == [] and fleet.make_room() == []
    os.kill(stoppable.pid, signal.SIGSTOP)
    assert len(fleet.load_weights(replace(ANNOUNCEMENT, version=1, offset=0))) == 1
    assert fleet.make_room() == [], "only one of the buffers may be held"
    tell(workers["one"], "sleeps")
    assert len(fleet.load_weights(replace(ANNOUNCEMENT, version=2, offset=4096))) == 2
    (given_up,) = fleet.make_room()
    assert given_up.startswith("stoppable still has not loaded 1: it is stopped")
    assert given_up.endswith("as another worker holds the rest; it is given up, 2 rollout workers are left")
    assert fleet.make_room() == []


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


def test_when_the_only_worker_is_stopped_the_run_ends(stoppable: Push) -> None:
    (name, standing) = list(stoppable.fleet._standings.items())[1]
    stoppable.fleet = RolloutFleet({name: standing.worker}, timeout_s=30, sync_timeout_s=0.3)
    os.kill(stoppable.pid, signal.SIGSTOP)
    with pytest.raises(WeightSyncError, match=r"^stoppable did not .*; no rollout worker holds the published weights$"):
        stoppable.push()


def test_a_rank_that_is_stopped_is_closed_with_the_others(stoppable: Push, workers: dict[str, Any]) -> None:
    (name, standing) = list(stoppable.fleet._standings.items())[1]
    os.kill(stoppable.pid, signal.SIGSTOP)
    actors.close_all({"one": workers["one"], name: standing.worker}, 0.3)
    found = processes.stat(stoppable.pid)
    assert found is None or found.state in ("Z", "X")
