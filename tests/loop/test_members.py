"""Who is given work, and who has been silent for too long."""

from __future__ import annotations

from hand_made import prompt, rules_with

from rlhf_dist.loop.events import NOBODY, Kept, MemberKind, Submit, TimedOut, Undone
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.open_groups import OpenRequest
from rlhf_dist.loop.requests import make_request
from rlhf_dist.types import Beat, Purpose

LIMITS_S: dict[MemberKind, float] = {"rollout": 10.0, "scoring": 20.0, "reference": 30.0, "collator": 40.0}


def members(workers: str = "ab", capacity: int = 4, scorers: str = "s", beat_s: float = 0.0) -> Members:
    """Workers that serve, each named by a letter, scoring servers, and a reference server `r`."""
    found = Members(workers, scorers, "r", capacity=capacity, limits_s=LIMITS_S, beat_s=beat_s)
    found.serve(tuple(workers))
    return found


def request(uid: str, n: int = 1, purpose: Purpose = "train") -> OpenRequest:
    return OpenRequest(make_request(prompt(uid), purpose, n, rules_with().sampling, 1), 0, 0.0, False)


def sent(found: Members, now: float = 0.0) -> list[tuple[str, list[str]]]:
    """(worker, uids) of each command."""
    commands = [command for command in found.dispatch(now) if isinstance(command, Submit)]
    return [(command.worker, [one.uid for one in command.requests]) for command in commands]


def test_work_goes_to_who_has_least_of_it_counted_in_samples() -> None:
    found = members()
    for uid, n in (("0", 3), ("1", 1), ("2", 1), ("3", 1)):
        found.wait((request(uid, n),))
    assert sent(found) == [("a", ["0"]), ("b", ["1", "2", "3"])]


def test_a_worker_is_given_no_more_than_its_capacity_and_the_rest_waits_in_order() -> None:
    found = members("a", capacity=4)
    for uid, n in (("0", 3), ("1", 2), ("2", 1)):
        found.wait((request(uid, n),))
    assert sent(found) == [("a", ["0"])], "2 would fit, and does not pass 1"
    found.done("rollout", "a", "train/0/0", 1.0)
    assert sent(found) == [("a", ["1", "2"])]


def test_a_group_above_the_capacity_goes_to_an_idle_worker() -> None:
    found = members("a", capacity=4)
    found.wait((request("0", 1),))
    found.wait((request("1", 9),))
    assert sent(found) == [("a", ["0"])]
    found.done("rollout", "a", "train/0/0", 1.0)
    assert sent(found) == [("a", ["1"])]


def test_requests_that_belong_together_go_to_one_worker() -> None:
    found = members(capacity=3)
    found.wait((request("0", 2),))
    found.wait((request("1", 2), request("1", 1, "baseline")))
    assert sent(found) == [("a", ["0"]), ("b", ["1", "1"])]


def test_what_is_cancelled_makes_room_at_once() -> None:
    found = members("a", capacity=2)
    found.wait((request("0", 2),))
    found.wait((request("1", 2),))
    assert sent(found) == [("a", ["0"])]
    found.cancelled("a", "train/0/0")
    assert sent(found) == [("a", ["1"])]


def test_what_is_withdrawn_is_given_to_nobody_and_its_partner_goes_alone() -> None:
    found = members("a")
    group, beside, other = request("0", 2), request("0", 1, "baseline"), request("1")
    found.wait((group, beside))
    found.wait((other,))
    found.withdraw(group)
    found.withdraw(other)
    (command,) = found.dispatch(0.0)
    assert isinstance(command, Submit) and [one.purpose for one in command.requests] == ["baseline"]


def test_urgent_requests_go_first() -> None:
    found = members("a", capacity=1)
    found.wait((request("0"),))
    found.wait((request("1"),), first=True)
    assert sent(found) == [("a", ["1"])]


def test_a_worker_that_does_not_serve_is_given_nothing() -> None:
    found = members()
    found.serve(("b",))
    for uid in "012":
        found.wait((request(uid),))
    assert sent(found) == [("b", ["0", "1", "2"])]
    found.serve(())
    found.wait((request("3"),))
    assert sent(found) == []
    found.serve(("a",))
    assert sent(found) == [("a", ["3"])]


def test_nobody_serves_before_the_first_weights() -> None:
    found = Members("a", "s", "", capacity=4, limits_s=LIMITS_S, beat_s=0.0)
    found.wait((request("0"),))
    assert sent(found) == []


def test_a_lost_worker_is_known_no_more() -> None:
    found = members()
    assert found.lose("a") and not found.lose("a")
    assert found.workers == ["b"]
    found.wait((request("0"),))
    assert sent(found) == [("b", ["0"])]
    found.done("rollout", "a", "train/0/0", 1.0)
    found.cancelled("a", "train/0/0")
    found.beat(Beat("a", 3), 1.0)


def test_the_server_with_least_to_do_is_asked() -> None:
    found = members(scorers="st")
    assert [found.server("scoring", key, 0.0) for key in ("0", "1", "2")] == ["s", "t", "s"]
    found.done("scoring", "s", "0", 1.0)
    found.done("scoring", "s", "2", 1.0)
    assert found.server("scoring", "3", 1.0) == "s"


def test_a_member_that_has_work_and_gives_no_sign_is_silent() -> None:
    found = members("a")
    found.wait((request("0"),))
    found.dispatch(5.0)
    found.server("scoring", "0", 6.0)
    assert found.silent(15.0) == []
    assert found.silent(15.1) == [TimedOut("rollout", "a", 10.0)]
    assert found.silent(26.1) == [TimedOut("rollout", "a", 10.0), TimedOut("scoring", "s", 20.0)]


def test_requests_wait_no_longer_than_a_limit_for_a_worker_that_serves() -> None:
    """One refused the last push and another is lost: the learner waits for groups, so no push comes that could help."""
    found = members()
    found.serve(("b",))
    found.lose("b")
    found.wait((request("0"),))
    assert found.dispatch(5.0) == found.dispatch(6.0) == found.silent(15.0) == []
    assert found.silent(15.1) == [TimedOut("rollout", NOBODY, 10.0)]
    found.serve(("a",))
    assert sent(found, 16.0) == [("a", ["0"])] and found.silent(16.1) == []
    found.done("rollout", "a", "train/0/0", 17.0)
    assert found.dispatch(17.0) == found.silent(1000.0) == []


def test_the_collator_is_a_member_too() -> None:
    found = members()
    found.server("collator", "0", 0.0)
    found.server("collator", "1", 1.0)
    found.heard(Kept("0"), "a", 30.0)
    assert found.silent(70.0) == [] and found.silent(70.1) == [TimedOut("collator", "collator", 40.0)]
    found.heard(Undone("collator", "collator", "1"), "a", 71.0)
    assert found.silent(1000.0) == []


def test_a_member_without_work_is_never_silent() -> None:
    found = members("a")
    assert found.silent(1000.0) == []
    found.server("reference", "0", 0.0)
    found.done("reference", "r", "0", 1.0)
    assert found.silent(1000.0) == []


def test_silence_counts_from_when_work_begins() -> None:
    found = members("a")
    found.server("scoring", "0", 1000.0)
    assert found.silent(1019.0) == []


def test_answers_are_signs_however_long_the_queue() -> None:
    found = members("a")
    for number in range(50):
        found.server("scoring", str(number), 0.0)
    for number in range(49):
        found.done("scoring", "s", str(number), 15.0 * (number + 1))
        assert found.silent(15.0 * (number + 1) + 19.0) == []


def test_more_work_is_no_sign_of_progress() -> None:
    found = members("a")
    found.server("scoring", "0", 0.0)
    found.server("scoring", "1", 15.0)
    assert found.silent(21.0) == [TimedOut("scoring", "s", 20.0)]


def test_a_beat_is_a_sign_only_where_the_engine_has_made_steps() -> None:
    found = members("a")
    found.wait((request("0"),))
    found.dispatch(0.0)
    found.beat(Beat("a", 1), 8.0)
    assert found.silent(17.0) == []
    found.beat(Beat("a", 1), 17.0)
    assert found.silent(19.0) == [TimedOut("rollout", "a", 10.0)]


def test_steps_that_a_worker_has_not_told_of_yet_are_not_held_against_it() -> None:
    """It makes one each second and tells of them each 60: far more rarely than its limit of 10."""
    found = members("a", beat_s=60.0)
    found.wait((request("0"),))
    found.dispatch(0.0)
    for now in range(1, 600):
        if now % 60 == 0:
            found.beat(Beat("a", now), now)
        assert found.silent(now) == []
    assert found.silent(540.0 + 71.0) == [TimedOut("rollout", "a", 10.0)], "and one that stops is found"
