"""What is left of a run that failed or was stopped: an event and a summary that is not taken for a finished one's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_dist.errors import ActorTimeout, ConfigError, DiskError, RunError
from rlhf_dist.loop.run_directory import RunDirectory, open_run_directory, write_json
from rlhf_dist.loop.run_end import end_recorded, read_summary
from rlhf_dist.telemetry.alerts import THE_END, AlertKind
from rlhf_dist.telemetry.run_telemetry import Telemetry
from rlhf_dist.telemetry.sinks import EventLog, Sink


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    found = open_run_directory(str(tmp_path), "run", "seed: 1\n", resume=False)
    yield found
    found.close()


def telemetry_of(run: RunDirectory) -> Telemetry:
    return Telemetry([EventLog(run.events)], lambda _: None)


def stop() -> tuple[str, int]:
    return "stopped by SIGTERM", 143


@pytest.mark.parametrize(
    ("error", "name", "outcome", "message", "code"),
    [
        (RunError("learner rank 1 died"), "RunError", "failed", "learner rank 1 died", 1),
        (ConfigError("seed: 1.5 is not whole"), "ConfigError", "failed", "seed: 1.5 is not whole", 2),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError", "failed", "division by zero", 1),
        (KeyboardInterrupt(), "SIGTERM", "stopped", "stopped by SIGTERM", 143),
    ],
)
def test_how_it_ended_is_in_the_events_and_the_summary(
    run: RunDirectory, error: BaseException, name: str, outcome: str, message: str, code: int
) -> None:
    telemetry = telemetry_of(run)
    with pytest.raises(type(error)), end_recorded(run, telemetry, "train", stop):
        telemetry.log(7, {})
        raise error
    event = json.loads(run.events.read_text().splitlines()[-1])
    assert (event["kind"], event["message"]) == (outcome, message)
    expected = {"command": "train", "error": name, "exit_code": code, "reached_step": 7}
    assert expected.items() <= event["facts"].items()
    assert event["facts"].get("alert") == ("fault" if outcome == "failed" else None)
    summary = json.loads(run.summary.read_text())
    assert (expected | {"outcome": outcome, "message": message}).items() <= summary.items()
    assert read_summary(run.path) is None, "nobody takes it for a finished run's"


def test_people_are_called_for_a_fault_and_a_wait_and_not_for_a_stop(run: RunDirectory) -> None:
    for error, kinds in (
        (ActorTimeout("learner rank 1 did not answer in 5 s (learner.timeout_s)"), ["wait"]),
        (RunError("learner rank 1 died"), ["fault"]),
        (KeyboardInterrupt(), []),
    ):
        called: list[tuple[str, ...]] = []

        class Called(Sink):
            def alert(self, kind: AlertKind, text: str, subject: str, found: list[tuple[str, ...]] = called) -> None:
                found.append((kind, text, subject))

        with pytest.raises(type(error)), end_recorded(run, Telemetry([Called()], print), "train", stop):
            raise error
        assert called == [(kind, str(error), THE_END) for kind in kinds]


def test_a_finished_run_keeps_its_own_summary_and_has_no_such_event(run: RunDirectory) -> None:
    with end_recorded(run, telemetry_of(run), "sft", stop):
        write_json(run.summary, {"outcome": "finished", "step": 4})
    assert read_summary(run.path) == {"outcome": "finished", "step": 4}
    assert run.events.read_text() == ""


def test_what_the_run_found_before_it_failed_stays_and_what_an_earlier_start_left_does_not(run: RunDirectory) -> None:
    write_json(run.summary, {"step": 2, "after": {"a": 1.0}})
    assert read_summary(run.path) == {"step": 2, "after": {"a": 1.0}}, "earlier versions said no outcome"
    with pytest.raises(RunError), end_recorded(run, telemetry_of(run), "train", stop):
        assert not run.summary.exists()
        write_json(run.summary, {"outcome": "finished", "step": None, "ledger": "1 lost"})
        raise RunError("the ledger does not add up")
    summary = json.loads(run.summary.read_text())
    assert (summary["outcome"], summary["ledger"], summary["reached_step"]) == ("failed", "1 lost", None)


def test_a_run_that_was_resumed_and_logged_nothing_reached_its_checkpoint(run: RunDirectory) -> None:
    (run.checkpoints / "step-5").mkdir()
    with pytest.raises(RunError), end_recorded(run, telemetry_of(run), "train", stop):
        raise RunError("no")
    assert json.loads(run.summary.read_text())["reached_step"] == 5


def test_a_full_disk_does_not_hide_what_ended_the_run(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise DiskError("no space left")

    telemetry = telemetry_of(run)
    monkeypatch.setattr(telemetry, "event", full)
    monkeypatch.setattr("rlhf_dist.loop.run_end.write_json", full)
    with pytest.raises(RunError, match=r"^the first$"), end_recorded(run, telemetry, "train", stop):
        raise RunError("the first")


def test_output_that_nobody_reads_any_more_is_no_failure_of_the_run(run: RunDirectory) -> None:
    with pytest.raises(BrokenPipeError), end_recorded(run, telemetry_of(run), "train", stop):
        write_json(run.summary, {"outcome": "finished", "step": 4})
        raise BrokenPipeError
    assert read_summary(run.path) is not None
