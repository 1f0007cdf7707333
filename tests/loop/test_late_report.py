"""What is known of how far processes have come: who is to blame for a step without end, and what is written then."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.errors import ActorTimeout, RanksSilent
from rlhf_dist.loop.activity import Activity, Seen
from rlhf_dist.loop.events import NOBODY, MemberKind, TimedOut
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.late_report import LateReports, Report, no_report
from rlhf_dist.loop.members import Members
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.sinks import EventLog


def watched() -> Healing:
    """A worker that has decoded until second 3, a rank that has begun an update then, and a server that never said."""
    made = Healing(
        {"worker": "rollout", "rank": "learner", "server": "scoring"},
        respawns=2,
        window_s=100.0,
        pulse_s=15.0,
        start_s=50.0,
    )
    for second in range(1, 6):
        made.pulse("worker", second, Activity("generate", {"steps": min(second, 3)}, float(second)))
        made.pulse("rank", second, Activity("update" if second > 2 else "", {"micro_batches": 7}))
    return made


def test_progress_is_what_changes_and_a_sign_of_life_is_none() -> None:
    made = watched()
    assert made.quiet_s(["worker"], 9.0) == 6.0 and made.quiet_s(["worker", "rank"], 9.5) == 6.5
    made.pulse("rank", 9.0, Activity("update", {"micro_batches": 8}))
    assert made.quiet_s(["worker", "rank"], 9.5) == 0.5, "of the one that went on last"
    assert made.quiet_s(["server"], 9.0) == made.quiet_s([], 9.0) == math.inf
    assert made.progress(10.0)["worker"] == {
        "phase": "generate",
        "counts": {"steps": 3},
        "phase_s": 5.0,
        "without_progress_s": 7.0,
        "without_sign_s": 5.0,
    }
    made.lost("worker", "it died", 10.0)
    assert made.progress(12.0)["worker"] == {"phase": "start", "phase_s": 2.0} and "server" not in made.progress(12.0)
    assert made.quiet_s(["worker"], 12.0) == math.inf, "the other one, which comes back, begins anew"


def test_the_time_in_a_phase_is_no_progress() -> None:
    seen = Seen(Activity("save", {}, 1.0), moved=1.0)
    seen.look(Activity("save", {}, 30.0), now=30.0)
    assert seen.moved == 1.0 and seen.facts(31.0, 30.0)["phase_s"] == 30.0
    seen.look(Activity("", {}), now=32.0)
    assert seen.moved == 32.0 and seen.facts(32.0, 32.0)["phase"] == "idle"


class AtTen:
    """An inbox whose clock stands still."""

    def __init__(self) -> None:
        self.report: Report = no_report

    def listen(self, listener: Any) -> None: ...

    def pump(self) -> None: ...

    def now(self) -> float:
        return 10.0


def reports(folder: Path, asked: list[list[str]]) -> LateReports:
    def stacks(names: Any) -> dict[str, str]:
        asked.append(list(names))
        return {name: f"frames of {name}" for name in names}

    made = LateReports(Telemetry([EventLog(folder / "events.jsonl")], lambda _: None), folder, stacks)
    made.watch(watched(), where := AtTen())
    assert where.report == made.report, "who waits for processes there reports, too"
    return made


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_an_event_and_a_file_for_each(tmp_path: Path) -> None:
    asked: list[list[str]] = []
    made = reports(tmp_path, asked)
    first, second = tmp_path / "faults" / "stacks-1.txt", tmp_path / "faults" / "stacks-2.txt"
    assert made.report("worker is late", ["worker"]) == f"; stacks: {first}"
    assert first.read_text() == "worker is late\n\n==== worker ====\nframes of worker\n"
    assert made.report("nothing goes on", []) == f"; stacks: {second}"
    assert asked == [["worker"], ["worker", "rank", "server"]], "where it may be any, all are looked at"
    (one, _) = events(tmp_path)
    assert (one["kind"], one["message"]) == ("late", "worker is late")
    assert one["facts"]["silent"] == ["worker"] and one["facts"]["stacks"] == str(first)
    assert one["facts"]["members"]["rank"]["counts"] == {"micro_batches": 7}


def test_where_stacks_cannot_be_taken_the_file_says_so(tmp_path: Path) -> None:
    def fails(names: Any) -> dict[str, str]:
        raise OSError("no process can be started")

    made = LateReports(Telemetry([EventLog(tmp_path / "events.jsonl")], lambda _: None), tmp_path, fails)
    assert made.report("worker is late", ["worker"]).startswith("; stacks: ")
    assert "OSError: no process can be started" in (tmp_path / "faults" / "stacks-1.txt").read_text()


def test_where_the_file_cannot_be_written_the_event_says_so(tmp_path: Path) -> None:
    (tmp_path / "faults").write_text("a file")
    assert reports(tmp_path, []).report("late", ["worker"]) == ""
    (one,) = events(tmp_path)
    assert one["facts"]["stacks"] == "" and one["facts"]["problem"].startswith(str(tmp_path / "faults"))


@pytest.mark.parametrize("kind", [ActorTimeout, RanksSilent])
def test_a_run_that_ends_for_it_names_the_file(tmp_path: Path, kind: type[ActorTimeout]) -> None:
    with pytest.raises(kind) as found, reports(tmp_path, []).at_the_end():
        raise kind("rank is late", ["rank"])
    assert str(found.value) == f"rank is late; stacks: {tmp_path / 'faults' / 'stacks-1.txt'}"
    assert events(tmp_path)[0]["facts"]["silent"] == ["rank"]


def test_another_end_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^wrong$"), reports(tmp_path, []).at_the_end():
        raise ValueError("wrong")
    assert not (tmp_path / "events.jsonl").exists() or not events(tmp_path)


def test_a_step_without_end_is_found_and_who_made_no_progress_for_longest_is_to_blame() -> None:
    """The worker's own limit is far away; it says `generate` all the time."""
    made, members = stepping(step_s=100.0), Members(["worker"], ["server"], [], capacity=4, limits_s=LIMITS, beat_s=1.0)
    assert made.overdue(1e6, members, []) == [], "before anything has begun there is no limit"
    made.reached(0.0)
    for now in range(0, 101, 10):
        made.pulse("worker", now, Activity("generate", {"steps": min(now, 40)}))
        made.pulse("server", now, Activity("score", {"groups": now}))
        made.pulse("rank", now)
        assert made.overdue(now, members, []) == []
    (late,) = made.overdue(101.0, members, [])
    assert late == TimedOut(
        "rollout", "worker", 100.0, "step", ends=False, detail="worker has made no progress in 'generate' for 61 s"
    )
    assert made.overdue(102.0, members, []) == [], "it has as long again, for what is done about it"
    assert made.overdue(202.0, members, [])


@pytest.mark.parametrize(
    ("busy", "detail"),
    [
        (True, "all that have work (worker) go on with it, so a step takes longer: raise the limit"),
        (False, "no process has any work"),
    ],
)
def test_where_nobody_is_to_blame_the_run_ends(busy: bool, detail: str) -> None:
    made, members = stepping(step_s=100.0), Members(["worker"], ["server"], [], capacity=4, limits_s=LIMITS, beat_s=1.0)
    made.reached(0.0)
    for now in range(0, 102, 10):
        made.pulse("worker", now, Activity("generate" if busy else "", {"steps": now}))
        made.pulse("server", now)
        made.pulse("rank", now)
    (late,) = made.overdue(101.0, members, [])
    assert late == TimedOut("rollout", NOBODY, 100.0, "step", ends=True, detail=detail)


def test_steps_in_time_and_a_limit_of_0_say_nothing_and_a_rebuild_begins_anew() -> None:
    members = Members(["worker"], ["server"], [], capacity=4, limits_s=LIMITS, beat_s=1.0)
    off, on = stepping(step_s=0.0), stepping(step_s=100.0)
    off.reached(0.0)
    assert off.overdue(1e6, members, []) == []
    for now in (0.0, 99.0, 198.0):
        on.reached(now)
        assert on.overdue(now + 99.0, members, []) == []
    on.rebuild("a rank died", 290.0)
    assert on.overdue(330.0, members, []) == [], "only the start of the ranks has a limit then, of 50"


LIMITS: dict[MemberKind, float] = {"rollout": 1e9, "scoring": 1e9, "reference": 1e9, "collator": 1e9}


def stepping(step_s: float) -> Healing:
    kinds: dict[str, MemberKind] = {"worker": "rollout", "rank": "learner", "server": "scoring"}
    return Healing(kinds, respawns=2, window_s=100.0, pulse_s=15.0, start_s=50.0, step_s=step_s)
