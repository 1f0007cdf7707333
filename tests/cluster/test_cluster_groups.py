"""Waiting on other processes: a real Ray with light actors that sleep, die, raise and lie."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_stand_ins
import pytest
import ray
from cluster_stand_ins import ANNOUNCEMENT, PROMPTS, REQUESTS, group, start, tell

from rlhf_dist.cluster import actors, processes
from rlhf_dist.cluster.groups import ScoringFleet
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.session import reserve
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import Config, RewardSpec, ScoringConfig
from rlhf_dist.errors import ActorLost, ActorTimeout, DataError, ResourceError, RewardError, RunError, WeightSyncError
from rlhf_dist.types import DroppedPrompt, Handle

machine, pair, workers = cluster_stand_ins.machine, cluster_stand_ins.pair, cluster_stand_ins.workers

REWARDS = """
import os, time

def reward(prompts, responses, answers):
    with open(os.path.join(os.path.dirname(__file__), "mode")) as file:
        mode = file.read()
    if mode == "hangs":
        time.sleep(600)
    if mode == "raises":
        raise KeyError("missing")
    return {"right": [1.0] * len(responses), "nan": [float("nan")] * len(responses), "few": []}[mode]
"""


def fleet(workers: dict[str, Any], timeout_s: float = 30.0, sync_timeout_s: float = 30.0) -> RolloutFleet:
    return RolloutFleet(workers, timeout_s=timeout_s, sync_timeout_s=sync_timeout_s)


def test_one_that_sleeps_is_named_with_the_call_and_the_limit(workers: dict[str, Any]) -> None:
    tell(workers["two"], "sleeps")
    calls = {f"rollout worker {name}": actor.work.remote() for name, actor in workers.items()}
    begun = time.monotonic()
    with pytest.raises(ActorTimeout) as caught:
        gather(calls, "generate", 0.5)
    assert str(caught.value) == "rollout worker two did not finish 'generate' in 0.5 s"
    assert time.monotonic() - begun < 1.4, "it did not wait for the sleeper"


def test_a_signal_to_the_process_group_does_not_reach_ray(machine: Any) -> None:
    """`timeout`, batch systems and Ctrl-Z signal the whole group: a Ray that ends or stops first leaves us waiting."""
    found = processes.ray_children()
    assert len(found) == 2, "gcs_server and raylet"
    assert all(os.getpgid(pid) != os.getpgid(0) for pid in found)


def test_one_that_dies_is_named_with_its_log(machine: Any) -> None:
    doomed = start("doomed")
    tell(doomed, "dies")
    with pytest.raises(ActorLost) as caught:
        gather({"learner rank 1": doomed.work.remote()}, "update", 30)
    assert str(caught.value).startswith("learner rank 1 died during 'update': ")
    assert "logs/learner-rank-1.log" in str(caught.value)
    assert processes.lost_ray() is None
    begun = time.monotonic()
    actors.close_all({"learner rank 1": doomed})
    assert time.monotonic() - begun < actors.CLOSE_LIMIT_S, "the dead are not waited for"


def test_a_rank_that_fails_because_its_peer_died_is_not_blamed(workers: dict[str, Any]) -> None:
    doomed = start("doomed")
    tell(workers["one"], "breaks")
    tell(doomed, "dies late")
    with pytest.raises(ActorLost, match=r"^learner rank 1 died during 'update': "):
        gather({"learner rank 0": workers["one"].work.remote(), "learner rank 1": doomed.work.remote()}, "update", 30)


def test_ray_prints_nothing_of_its_own_on_the_screen(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from ray._private import worker

    worker.print_to_stdstream({"lines": ["A worker died"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert capsys.readouterr() == ("", "")


def test_a_package_error_arrives_as_itself_in_its_own_words(workers: dict[str, Any]) -> None:
    tell(workers["one"], "refuses")
    with pytest.raises(DataError) as caught:
        gather({"scoring worker": workers["one"].work.remote()}, "score", 30)
    assert type(caught.value).__name__ == "DataError" and str(caught.value) == "data.jsonl:3: not JSON"


def test_any_other_error_names_the_process_and_keeps_its_traceback(workers: dict[str, Any]) -> None:
    tell(workers["one"], "breaks")
    with pytest.raises(RunError) as caught:
        gather({"learner rank 0": workers["one"].work.remote()}, "update", 30)
    first, *rest = str(caught.value).splitlines()
    assert first == "learner rank 0 failed in 'update': IndexError: list index out of range"
    assert any("in work" in line for line in rest)


def test_prompts_are_shared_out_and_tokens_stay_away(workers: dict[str, Any]) -> None:
    found = list(fleet(workers).generate(REQUESTS))
    dropped = [item for item in found if isinstance(item, DroppedPrompt)]
    assert [drop.uid for drop in dropped] == ["0/4"]
    pairs = [item for item in found if not isinstance(item, DroppedPrompt)]
    assert {head.uid: head.worker for head, _ in pairs} == {"0/0": "one", "0/1": "two", "0/2": "one", "0/3": "two"}
    assert all(isinstance(handle.place, ray.ObjectRef) for _, handle in pairs)
    assert fleet(workers).texts(pairs[0][1]) == ("a", "bc")


def test_generation_has_a_limit(workers: dict[str, Any]) -> None:
    tell(workers["two"], "sleeps")
    with pytest.raises(ActorTimeout, match=r"^two did not finish 'generate' in 0\.5 s \(rollout\.timeout_s\)$"):
        list(fleet(workers, timeout_s=0.5).generate(REQUESTS[:2]))


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("lies", "bucket 0 arrived as another hash"),
        ("torn", "arrived torn"),
        ("breaks", "one failed in 'load_weights': IndexError: list index out of range"),
        ("refuses", "data.jsonl:3: not JSON"),
        ("sleeps", "did not load version 3 in 0.7 s (weights.timeout_s)"),
    ],
)
def test_a_worker_without_a_right_receipt_serves_no_tokens(workers: dict[str, Any], mode: str, why: str) -> None:
    one_of_two = fleet(workers, sync_timeout_s=0.7)
    tell(workers["one"], mode)
    (problem,) = one_of_two.load_weights(ANNOUNCEMENT)
    assert problem.startswith("one") and why in problem
    served = [item for item in one_of_two.generate(REQUESTS[:4]) if not isinstance(item, DroppedPrompt)]
    assert {head.worker for head, _ in served} == {"two"} and len(served) == 4
    tell(workers["one"], "right")
    assert one_of_two.load_weights(ANNOUNCEMENT) == [], "a push that succeeds lets it serve again"
    again = [item for item in one_of_two.generate(REQUESTS[:4]) if not isinstance(item, DroppedPrompt)]
    assert {head.worker for head, _ in again} == {"one", "two"}


def test_a_worker_that_dies_in_a_push_is_given_up_at_once(workers: dict[str, Any]) -> None:
    doomed = start("doomed")
    tell(doomed, "dies")
    both = fleet({"rollout worker 0": doomed, "rollout worker 1": workers["two"]})
    (problem,) = both.load_weights(ANNOUNCEMENT)
    assert problem.startswith("rollout worker 0 died during 'load_weights': ")
    assert problem.endswith("; it is given up, 1 rollout worker is left")
    assert both.load_weights(ANNOUNCEMENT) == [], "it is asked no more"
    served = [item for item in both.generate(REQUESTS[:2]) if not isinstance(item, DroppedPrompt)]
    assert {head.worker for head, _ in served} == {"two"}


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("broken", "the load of version 3 failed (OSError: gone)"),
        ("skips", "version 3: its engine loaded 3 of 4 elements of a"),
    ],
)
def test_a_worker_whose_engine_is_broken_is_given_up_at_once(workers: dict[str, Any], mode: str, why: str) -> None:
    doomed = start("doomed")
    tell(doomed, mode)
    both = fleet({"doomed": doomed, "rollout worker 1": workers["two"]})
    (problem,) = both.load_weights(ANNOUNCEMENT)
    assert problem.startswith("doomed") and problem.endswith(f"{why}; it is given up, 1 rollout worker is left")
    assert both.load_weights(ANNOUNCEMENT) == [], "it is asked no more"
    with pytest.raises(ActorLost):
        gather({"doomed": doomed.work.remote()}, "work", 60)


def test_an_answer_that_was_lost_on_the_way_names_whose_it_was(workers: dict[str, Any]) -> None:
    owner = start("owner")
    tell(workers["two"], "sleeps")
    (answer,) = gather({"owner": owner.hand_over.remote(workers["two"])}, "hand over", 120)["owner"]
    ray.kill(owner)
    with pytest.raises(ActorLost, match=r"^the answer of rollout worker 1 to 'generate' is lost: OwnerDiedError: "):
        gather({"rollout worker 1": answer}, "generate", 30)


def test_when_no_worker_holds_the_weights_the_run_ends(workers: dict[str, Any]) -> None:
    for worker in workers.values():
        tell(worker, "lies")
    with pytest.raises(WeightSyncError, match=r"^one, version 3: .*; two, version 3: "):
        fleet(workers).load_weights(ANNOUNCEMENT)


def test_a_reservation_that_does_not_fit_is_an_error_with_both_numbers(machine: Any) -> None:
    needed = reserve([{"CPU": 64.0, "GPU": 0.0}] * 2, 1.0)
    with (
        pytest.raises(ResourceError, match=r"128 CPUs and 0 GPUs free within 1 s \(cluster\.start_timeout_s\)"),
        needed,
    ):
        pass


@pytest.fixture(scope="module")
def scoring(machine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ScoringFleet, Path]]:
    """Two real scoring servers with a user's function, and the file that says what the function does."""
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "group_rewards.py").write_text(REWARDS)
    rewards = {"mine": RewardSpec(kind="function", function="group_rewards:reward", timeout_s=1.0)}
    config = Config(scoring=ScoringConfig(rewards))
    log = str(folder / "logs" / "scoring.log")
    specs = [ActorSpec(f"scoring server {i}", config, "", "cpu", 1, log, i, str(folder)) for i in range(2)]
    with reserve([{"CPU": 0.1, "GPU": 0.0}], 60.0) as group:
        servers = actors.start_servers(actors.ScoringHost, specs, group)
        gather({name: server.ready.remote() for name, server in servers.items()}, "start", 120)
        yield ScoringFleet(servers, timeout_s=20), folder / "mode"


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raises", "raised KeyError: 'missing' at "),
        ("nan", "returned nan, not finite"),
        ("few", "returned 0 values for 2 responses"),
        ("hangs", "did not return within 1 s for 2 responses"),
    ],
)
def test_a_bad_reward_is_told_in_one_sentence(scoring: tuple[ScoringFleet, Path], mode: str, message: str) -> None:
    fleet, file = scoring
    file.write_text(mode)
    with pytest.raises(RewardError) as caught:
        fleet.gather({"0/0": fleet.submit(Handle(ray.put(group(PROMPTS[0]))))})
    assert str(caught.value).startswith("the reward mine (group_rewards:reward) ")
    assert message in str(caught.value) and "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_scores_come_back_by_uid(scoring: tuple[ScoringFleet, Path]) -> None:
    fleet, file = scoring
    file.write_text("right")
    found = fleet.gather({p.uid: fleet.submit(Handle(ray.put(group(p)))) for p in PROMPTS[:2]})
    assert {uid: scores.total.tolist() for uid, scores in found.items()} == {"0/0": [1.0, 1.0], "0/1": [1.0, 1.0]}
