"""Faults are counted from the events of a run, over all of its starts."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_dist.telemetry.fault_tally import FaultTally
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.sinks import EventLog, JsonlSink

EVENTS = [
    ("00:00:00", "training_started", {}),
    ("00:00:01", "warning", {}),
    ("00:00:02", "warning", {"alert": "push"}),
    ("00:00:03", "warning", {"alert": "fault"}),
    ("00:00:04", "returned", {}),
    ("00:00:05", "warning", {"alert": "fault"}),
    ("00:00:06", "rebuilt", {"seconds": 2.5}),
    ("00:00:07", "training_started", {}),
    ("00:00:10", "restart", {"class": "a process lost"}),
    ("00:00:15", "restart", {"class": "a process lost"}),
    ("00:00:25", "training_started", {}),
]


def written(path: Path, count: int) -> Path:
    lines = [
        json.dumps(
            {"time": f"2026-12-01T{when}.000+00:00", "kind": kind, "message": f"{kind} at {when}", "facts": facts}
        )
        for when, kind, facts in EVENTS[:count]
    ]
    path.write_text("\n".join([*lines, "[1]", '{"kind": "returned"}', "7", lines[-1][:20]]))
    return path


def test_counts_of_all_starts(tmp_path: Path) -> None:
    tally = FaultTally.of(written(tmp_path / "e", len(EVENTS)))
    assert tally.metrics() == {
        "faults/losses": 2.0,
        "faults/respawns": 1.0,
        "faults/rebuilds": 1.0,
        "faults/restarts": 2.0,
        "faults/recover_s": 2.5 + 10.0,
    }
    assert tally.started_again == ""
    assert tally.line() == (
        "faults: 2; started again: workers and servers 1x, the learner 1x, the run 2x; 12 s without training"
    )


def test_a_start_that_does_not_train_yet_knows_why_there_is_another(tmp_path: Path) -> None:
    tally = FaultTally.of(written(tmp_path / "e", len(EVENTS) - 1))
    assert tally.started_again == "restart at 00:00:15" and tally.metrics()["faults/recover_s"] == 2.5


def test_without_a_fault_there_is_nothing(tmp_path: Path) -> None:
    for tally in (FaultTally(), FaultTally.of(tmp_path / "none"), FaultTally.of(written(tmp_path / "e", 3))):
        assert (tally.metrics(), tally.line(), tally.started_again) == ({}, "", "")


def test_each_step_has_the_counts_so_far(tmp_path: Path) -> None:
    files = [JsonlSink(tmp_path / "m"), EventLog(tmp_path / "e")]
    telemetry = Telemetry(files, lambda _: None)
    telemetry.log(1, {"a": 1.0})
    telemetry.warn("scoring server 0 was killed", "fault", "scoring server 0")
    telemetry.log(2, {"a": 1.0})
    telemetry.event("returned", "scoring server 0 is ready again")
    telemetry.log(3, {"a": 1.0})
    telemetry.close()
    rows = [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()]
    assert [(row.get("faults/losses"), row.get("faults/respawns")) for row in rows] == [(None, None), (1, 0), (1, 1)]
    assert FaultTally.of(tmp_path / "e").metrics().items() <= rows[-1].items()
