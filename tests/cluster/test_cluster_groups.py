"""Waiting on other processes: a real Ray with light actors that sleep, die, raise and lie."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster_stand_ins
import pytest
import ray
from cluster_stand_ins import ANNOUNCEMENT, PROMPTS, REQUESTS, Ears, fleet, group, makers, serve, start, tell
from conftest import family

from rlhf_dist.cluster import actors, processes
from rlhf_dist.cluster.groups import ScoringFleet
from rlhf_dist.cluster.roster import Roster
from rlhf_dist.cluster.session import reserve
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.cluster.waits import gather
from rlhf_dist.config.schema import Config, RewardSpec, ScoringConfig
from rlhf_dist.errors import ActorLost, ActorTimeout, DataError, ResourceError, RewardError, RunError
from rlhf_dist.loop.events import Event, Lost, Scored
from rlhf_dist.types import Answered, Beat, Handle, Prompt, Unanswered

workers = cluster_stand_ins.workers

REWARDS = """
import os, time

def reward(prompts, responses, answers):
    with open(os.path.join(os.path.dirname(__file__), "mode")) as file:
        mode = file.read()
    if mode == "hangs":
        time.sleep(600)
    if mode == "slow":
        time.sleep(0.05)
        mode = "right"
    if mode == "raises":
        raise KeyError("missing")
    return {"right": [1.0] * len(responses), "nan": [float("nan")] * len(responses), "few": []}[mode]
"""


def test_one_that_sleeps_is_named_with_the_call_and_the_limit(workers: dict[str, Any]) -> None:
    tell(workers["two"], "sleeps")
    calls = {f"rollout worker {name}": actor.work.remote() for name, actor in workers.items()}
    begun = time.monotonic()
    with pytest.raises(ActorTimeout) as caught:
        gather(calls, "generate", 0.5)
    assert str(caught.value) == "rollout worker two did not finish 'generate' in 0.5 s"
    assert time.monotonic() - begun < 1.4, "it did not wait for the sleeper"


def test_a_signal_to_the_process_group_does_not_reach_ray(local_ray: None) -> None:
    """`timeout`, batch systems and Ctrl-Z signal the whole group: a Ray that ends or stops first leaves us waiting."""
    found = processes.ray_children()
    assert len(found) == 2, "gcs_server and raylet"
    assert all(os.getpgid(pid) != os.getpgid(0) for pid in found)


def test_ray_starts_nothing_that_no_run_uses(local_ray: None) -> None:
    started = [word for process in family(os.getpid()) for word in process.cmdline()]
    assert any(word.endswith("/raylet") for word in started)
    unused = ("dashboard/dashboard.py", "_private/monitor.py", "log_monitor.py")
    assert [word for word in started if word.endswith(unused)] == []


def test_one_that_dies_is_named_with_its_log(local_ray: None) -> None:
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


def test_ray_prints_nothing_of_its_own_on_the_screen(local_ray: None, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_what_a_worker_is_asked_for_comes_as_events_and_tokens_stay_away(workers: dict[str, Any]) -> None:
    ears = Ears()
    both = fleet(workers, ears)
    both.submit("one", REQUESTS[:2])
    both.submit("one", REQUESTS[2:3])
    both.submit("two", REQUESTS[3:])
    found = ears.hear(Answered, 4)
    assert dict(makers(ears.heard)) == {
        "train/0/0/0": "one",
        "train/0/1/0": "one",
        "train/0/2/0": "one",
        "train/0/3/0": "two",
    }
    assert all(isinstance(event.body.place, ray.ObjectRef) for event in found)
    (refused,) = ears.hear(Unanswered, 1)
    assert (refused.key, refused.drop.reason) == ("train/0/4/0", "prompt_too_long")
    assert {event.worker for event in ears.of(Beat)} == {"one", "two"}


def test_what_is_cancelled_is_not_heard_of(workers: dict[str, Any]) -> None:
    ears = Ears()
    both = fleet(workers, ears)
    tell(workers["one"], "holds 0/0")
    both.submit("one", REQUESTS[:1])
    ears.until(lambda: any(event.steps for event in ears.of(Beat)))
    both.cancel("one", [REQUESTS[0].key])
    both.submit("one", REQUESTS[1:2])
    ears.hear(Answered, 1)
    beats = len(ears.of(Beat))

    def rests() -> bool:
        """It makes steps as long as it has work."""
        steps = [event.steps for event in ears.of(Beat)[beats:] if event.worker == "one"]
        return len(steps) > 1 and steps[-2] == steps[-1]

    ears.until(rests)
    assert [event.key for event in ears.of(Answered)] == ["train/0/1/0"]


def test_a_worker_whose_engine_fails_is_lost_and_ended(workers: dict[str, Any]) -> None:
    doomed, ears = start("doomed"), Ears()
    tell(doomed, "breaks")
    both = fleet({"rollout worker 0": doomed, "two": workers["two"]}, ears)
    both.submit("rollout worker 0", REQUESTS[:1])
    (lost,) = ears.hear(Lost, 1)
    first = lost.why.splitlines()[0]
    assert first == "rollout worker 0 failed in 'generate': IndexError: list index out of range"
    assert (lost.member, lost.told, both.serving()) == ("rollout worker 0", False, ("two",))
    both.submit("rollout worker 0", REQUESTS[:1])  # nobody hears it
    with pytest.raises(ActorLost):
        for _ in range(300):  # a process ends a moment after it is told to
            tell(doomed, "right")
            time.sleep(0.1)


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
    ears = Ears()
    one_of_two = fleet(workers, ears, sync_timeout_s=0.7)
    tell(workers["one"], mode)
    (problem,) = one_of_two.load_weights(ANNOUNCEMENT)
    assert problem.startswith("one") and why in problem
    assert one_of_two.serving() == ("two",) and serve(one_of_two, ears) == {"two"}
    tell(workers["one"], "right")
    if mode == "sleeps":
        return  # `test_cluster_fleets` has what becomes of late receipts
    assert one_of_two.load_weights(ANNOUNCEMENT) == [], "a push that succeeds lets it serve again"
    assert serve(one_of_two, ears) == {"one", "two"} and ears.of(Lost) == []


def test_a_worker_that_dies_in_a_push_is_given_up_at_once(workers: dict[str, Any]) -> None:
    doomed, ears = start("doomed"), Ears()
    tell(doomed, "dies")
    both = fleet({"rollout worker 0": doomed, "rollout worker 1": workers["two"]}, ears)
    both.load_weights(ANNOUNCEMENT)  # its events may tell of the death before its receipt does
    (lost,) = ears.hear(Lost, 1)
    assert lost.member == "rollout worker 0"
    assert re.match(r"rollout worker 0 died during '(load_weights|generate)': ", lost.why)
    assert both.load_weights(ANNOUNCEMENT) == [], "it is asked no more"
    assert both.serving() == ("rollout worker 1",) and serve(both, ears) == {"two"}
    assert len(ears.of(Lost)) == 1


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("broken", "the load of version 3 failed (OSError: gone)"),
        ("skips", "version 3: its engine loaded 3 of 4 elements of a"),
    ],
)
def test_a_worker_whose_engine_is_broken_is_given_up_at_once(workers: dict[str, Any], mode: str, why: str) -> None:
    doomed, ears = start("doomed"), Ears()
    tell(doomed, mode)
    both = fleet({"doomed": doomed, "rollout worker 1": workers["two"]}, ears)
    (problem,) = both.load_weights(ANNOUNCEMENT)
    assert problem.startswith("doomed") and problem.endswith(f"{why}; it is given up, 1 rollout worker is left")
    assert ears.hear(Lost, 1) == [Lost("doomed", problem, told=True)]
    assert both.load_weights(ANNOUNCEMENT) == [], "it is asked no more"
    with pytest.raises(ActorLost):
        for _ in range(300):  # a process ends a moment after it is told to
            gather({"doomed": doomed.work.remote()}, "work", 60)
            time.sleep(0.1)
    ears.inbox.pump()
    assert len(ears.of(Lost)) == 1


def test_an_answer_that_was_lost_on_the_way_names_whose_it_was(workers: dict[str, Any]) -> None:
    owner = start("owner")
    tell(workers["two"], "sleeps")
    (answer,) = gather({"owner": owner.hand_over.remote(workers["two"])}, "hand over", 120)["owner"]
    ray.kill(owner)
    with pytest.raises(ActorLost, match=r"^the answer of rollout worker 1 to 'generate' is lost: OwnerDiedError: "):
        gather({"rollout worker 1": answer}, "generate", 30)


def test_where_no_worker_proves_the_weights_all_are_given_up_and_who_comes_back_is_asked(
    workers: dict[str, Any],
) -> None:
    """With one of them left, no other push might come."""
    liars, ears = {name: start(f"liar {name}") for name in ("it", "other")}, Ears()
    for liar in liars.values():
        tell(liar, "lies")
    both = fleet(liars, ears)
    problems = both.load_weights(ANNOUNCEMENT)
    ears.inbox.pump()
    assert [(lost.member, lost.why, lost.told) for lost in ears.of(Lost)] == [
        (name, text, True) for name, text in zip(liars, problems, strict=True)
    ]
    assert all("another hash" in text and "no rollout worker holds the published weights; it is" in text
               for text in problems)  # fmt: skip
    both.admit("it", workers["one"])
    ears.until(lambda: both.serving() == ("it",))


def test_where_nobody_is_left_a_push_waits_for_whoever_comes_back(workers: dict[str, Any]) -> None:
    doomed, ears = start("doomed"), Ears()
    tell(doomed, "dies")
    one = fleet({"it": doomed}, ears)
    assert [problem.startswith("it died") for problem in one.load_weights(ANNOUNCEMENT)] in ([True], [])
    ears.hear(Lost, 1)
    assert one.load_weights(ANNOUNCEMENT) == [] and one.serving() == ()
    one.admit("it", workers["one"])
    ears.until(lambda: one.serving() == ("it",))
    assert serve(one, ears) == {"one"}, "it has proved the version that was published while it was away"


def test_one_that_comes_back_and_cannot_prove_the_weights_is_lost_again(workers: dict[str, Any]) -> None:
    doomed, ears = start("doomed"), Ears()
    tell(doomed, "dies")
    both = fleet({"one": workers["one"], "it": doomed}, ears)
    both.load_weights(ANNOUNCEMENT)
    ears.hear(Lost, 1)
    liar = start("liar")
    tell(liar, "lies")
    both.admit("it", liar)
    ears.until(lambda: both.serving() == ("one",) and len(ears.of(Lost)) == 2)
    assert ears.of(Lost)[1].member == "it" and "another hash" in ears.of(Lost)[1].why


def test_one_that_is_back_and_lies_in_a_push_is_lost_again(local_ray: None) -> None:
    doomed, ears = start("doomed"), Ears()
    tell(doomed, "dies")
    one = fleet({"it": doomed}, ears)
    one.load_weights(ANNOUNCEMENT)
    ears.hear(Lost, 1)
    liar = start("liar")
    tell(liar, "lies")
    one.admit("it", liar)
    (told,) = one.load_weights(ANNOUNCEMENT)
    ears.inbox.pump()
    assert "another hash" in told and told.endswith("it is given up, 0 rollout workers are left")
    assert [lost.why for lost in ears.of(Lost)][1:] == [told]


def test_one_that_is_back_before_the_push_is_over_is_not_taken_for_the_one_that_died(workers: dict[str, Any]) -> None:
    """Another worker keeps the push waiting until then."""
    doomed, slow, ears = start("doomed"), start("slow"), Ears()
    tell(doomed, "dies")
    tell(slow, "sleeps")
    both = fleet({"it": doomed, "slow": slow}, ears)

    def back(events: Sequence[Event]) -> None:
        ears.heard.extend(events)
        if any(isinstance(event, Lost) for event in events) and both.serving() == ():
            both.admit("it", workers["one"])

    ears.inbox.listen(back)
    both.load_weights(ANNOUNCEMENT)
    ears.until(lambda: set(both.serving()) == {"it", "slow"})
    assert len(ears.of(Lost)) == 1 and serve(both, ears) == {"one", "slow"}


def test_a_reservation_that_does_not_fit_is_an_error_with_both_numbers(local_ray: None) -> None:
    needed = reserve([{"CPU": 64.0, "GPU": 0.0}] * 2, 1.0)
    with (
        pytest.raises(ResourceError, match=r"128 CPUs and 0 GPUs free within 1 s \(cluster\.start_timeout_s\)"),
        needed,
    ):
        pass


@pytest.fixture(scope="module")
def scoring(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """Two real scoring servers with a user's function, and the file that says what the function does."""
    folder = tmp_path_factory.mktemp("scoring")
    (folder / "group_rewards.py").write_text(REWARDS)
    rewards = {"mine": RewardSpec(kind="function", function="group_rewards:reward", timeout_s=1.0)}
    config = Config(scoring=ScoringConfig(rewards, timeout_s=1.2))
    log = str(folder / "logs" / "scoring.log")
    specs = [ActorSpec(f"scoring server {i}", config, "", "cpu", 1, log, i, str(folder)) for i in range(2)]
    with reserve([{"CPU": 0.1, "GPU": 0.0}], 60.0) as group:
        servers = Roster(group).start_servers(actors.ScoringHost, specs, actors.SERVER_THREADS, [0] * len(specs))
        gather({name: server.ready.remote() for name, server in servers.items()}, "start", 120)
        yield servers, folder / "mode"


def score(servers: dict[str, Any], prompts: list[Prompt]) -> list[Scored]:
    """Groups of these, all at once, at the first server."""
    ears = Ears()
    scoring = ScoringFleet(servers, ears.inbox, timeout_s=20)
    for prompt in prompts:
        scoring.submit("scoring server 0", prompt.uid, Handle(ray.put(group(prompt))))
    return ears.hear(Scored, len(prompts))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("raises", "raised KeyError: 'missing' at "),
        ("nan", "returned nan, not finite"),
        ("few", "returned 0 values for 2 responses"),
        ("hangs", "did not return within 1 s for 2 responses"),
    ],
)
def test_a_bad_reward_is_told_in_one_sentence(scoring: tuple[dict[str, Any], Path], mode: str, message: str) -> None:
    servers, file = scoring
    file.write_text(mode)
    with pytest.raises(RewardError) as caught:
        score(servers, PROMPTS[:1])
    assert str(caught.value).startswith("the reward mine (group_rewards:reward) ")
    assert message in str(caught.value) and "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_scores_come_back_by_key(scoring: tuple[dict[str, Any], Path]) -> None:
    servers, file = scoring
    file.write_text("right")
    found = score(servers, PROMPTS[:2])
    assert {event.key: event.scores.total.tolist() for event in found} == {"0/0": [1.0, 1.0], "0/1": [1.0, 1.0]}
    assert {event.server for event in found} == {"scoring server 0"}


def test_a_backlog_at_one_server_ends_nothing(scoring: tuple[dict[str, Any], Path]) -> None:
    """64 groups of 0.05 s wait for 3 s with limits of 1 s: of the reward, and of `scoring.timeout_s`."""
    servers, file = scoring
    file.write_text("slow")
    begun = time.monotonic()
    prompts = [replace(PROMPTS[0], uid=f"0/{i}") for i in range(64)]
    assert len(score(servers, prompts)) == 64
    assert time.monotonic() - begun >= 64 * 0.05
