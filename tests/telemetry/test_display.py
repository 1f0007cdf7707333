import io
import time

import pytest

from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import Pace, PlainProgress, RichProgress, clock, make_progress, step_facts

METRICS = {names.REWARD_MEAN: 0.4125, names.TOKENS_PER_S: 1234.4, names.RESPONSE_LENGTH: 5.25, "unknown/x": 1.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    stream = io.StringIO()
    progress = make_progress("auto", stream)
    assert isinstance(progress, PlainProgress)
    progress.stage("starting 1 rollout worker")
    progress.eval(0, {"eval/greedy_accuracy": 0.5, "eval/pass_at_4": 0.75})
    progress.step(1, 80, METRICS)
    progress.warn("[bold]odd[/bold] but kept")
    progress.step(2, 80, METRICS)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "starting 1 rollout worker ..."
    assert lines[1].startswith("  starting 1 rollout worker: ") and lines[1].endswith(" s")
    assert lines[2] == "held out, step 0: greedy accuracy 0.500  pass at 4 0.750"
    assert lines[3] == "step  1/80  reward 0.412  held-out 0.500  length 5.2  tok/s 1,234"
    assert lines[4] == "warning: [bold]odd[/bold] but kept"
    assert lines[5].startswith("step  2/80  reward 0.412") and "  eta " in lines[5]


def test_a_long_stage_shows_signs_of_life_and_stops_when_it_ends() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream, heartbeat_s=0.02)
    progress.stage("starting 2 rollout workers")
    deadline = time.monotonic() + 10
    while "still starting 2 rollout workers (" not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.01)
    progress.close()
    ended = stream.getvalue()
    time.sleep(0.1)
    assert stream.getvalue() == ended


def test_a_closed_stream_does_not_stop_the_run() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    stream.close()
    progress.step(1, 2, METRICS)
    progress.close()


def test_rich_in_a_terminal_keeps_square_brackets_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    progress = make_progress("auto", stream)
    assert isinstance(progress, RichProgress)
    progress.stage("starting 1 rollout worker [GPU]")
    progress.step(1, 80, METRICS)
    progress.eval(1, {"eval/greedy_accuracy": 0.5})
    progress.warn("[red]not markup[/red]")
    progress.step(2, 80, METRICS)
    progress.close()
    progress.close()
    seen = stream.getvalue()
    for text in ("starting 1 rollout worker [GPU]: ", "[red]not markup[/red]", "step 2/80", "reward 0.412", "greedy"):
        assert text in seen, text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress("auto", Terminal()), PlainProgress)
    assert isinstance(make_progress("plain", Terminal()), PlainProgress)


def test_pace_counts_from_the_first_step_seen() -> None:
    pace = Pace()
    assert pace.seconds_left(41, 80, 100.0) is None
    assert pace.seconds_left(43, 80, 110.0) == pytest.approx(37 * 5.0)
    assert pace.seconds_left(80, 80, 300.0) == 0.0


def test_times_and_facts_for_people() -> None:
    assert [clock(s) for s in (0.4, 59.4, 187.0, 7500.0)] == ["0 s", "59 s", "3m07s", "2h05m"]
    assert step_facts({names.SFT_LOSS: 1.23456}, 60.0) == "loss 1.2346  eta 1m00s"
