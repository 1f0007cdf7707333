import io
import re
import time

import pytest

from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.display import (
    Pace,
    PlainProgress,
    Progress,
    RichProgress,
    clock,
    make_progress,
    number,
    step_facts,
)

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
    assert lines[2] == "held out, step 0: greedy accuracy 0.500  pass@4 0.750"
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


def test_a_resume_goes_on_showing_the_latest_held_out_results() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.remember({"eval/greedy_accuracy": 0.5, "eval/pass_at_4": 0.75})
    progress.step(41, 80, METRICS)
    assert stream.getvalue() == "step 41/80  reward 0.412  held-out 0.500  length 5.2  tok/s 1,234\n", "and no line"


def test_pace_counts_from_the_first_step_seen() -> None:
    pace = Pace()
    assert pace.seconds_left(41, 80, 100.0) is None
    assert pace.seconds_left(43, 80, 110.0) == pytest.approx(37 * 5.0)
    assert pace.seconds_left(80, 80, 300.0) == 0.0


def test_times_and_facts_for_people() -> None:
    assert [clock(s) for s in (0.4, 59.4, 187.0, 7500.0)] == ["0 s", "59 s", "3m07s", "2h05m"]
    assert step_facts({names.SFT_LOSS: 1.23456}, 60.0) == "loss 1.2346  eta 1m00s"


def test_gold_and_kl_stand_beside_the_reward_where_a_run_has_them() -> None:
    metrics = METRICS | {names.REWARD_GOLD: -0.25, names.KL_REFERENCE: 3.456}
    assert step_facts(metrics, None) == "reward 0.412  gold -0.250  kl 3.46  length 5.2  tok/s 1,234"


def test_a_reward_model_shows_its_loss_and_its_latest_accuracy() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.eval(50, {names.REWARD_MODEL_ACCURACY: 0.75, names.REWARD_MODEL_HELD_OUT_LOSS: 0.5})
    progress.step(60, 300, {names.REWARD_MODEL_LOSS: 0.61234})
    assert stream.getvalue().splitlines()[1] == "step  60/300  loss 0.6123  held-out accuracy 0.750"


def test_next_to_nothing_below_zero_is_shown_as_zero() -> None:
    metrics = {names.REWARD_MEAN: -0.0001, names.KL_REFERENCE: -0.004, names.SFT_LOSS: -0.00001}
    assert step_facts(metrics, None) == "reward 0.000  kl 0.00  loss 0.0000"
    assert (number(-0.0001), number(-0.25)) == ("0.000", "-0.250")


def in_file() -> tuple[io.StringIO, Progress]:
    stream = io.StringIO()
    return stream, make_progress("plain", stream)


def in_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, Progress]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(width))
    stream = Terminal()
    return stream, make_progress("rich", stream)


ALL = METRICS | {names.REWARD_GOLD: -0.25, names.KL_REFERENCE: 3.456, names.EVAL_GREEDY: 0.5}


@pytest.mark.parametrize(("width", "bar", "length"), [(80, False, False), (160, True, True)])
def test_a_narrow_terminal_gives_up_the_bar_and_the_length_and_keeps_the_clock(
    monkeypatch: pytest.MonkeyPatch, width: int, bar: bool, length: bool
) -> None:
    stream, progress = in_terminal(width, monkeypatch)
    progress.step(9, 80, ALL)
    progress.step(10, 80, ALL)
    progress.close()
    last = re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", stream.getvalue()).split("step 10/80")[-1]
    assert re.search(r"\d:\d\d:\d\d", last), last
    assert "reward 0.412" in last and "eta " in last and "\u2026" not in last
    assert (("\u2501" in last), ("length 5.2" in last)) == (bar, length), last


@pytest.mark.parametrize("room", [None, 75, 74, 63, 62, 50, 49])
def test_facts_give_way_one_by_one(room: int | None) -> None:
    facts = step_facts(ALL, None, room)
    labels = [fact.split(" ")[0] for fact in facts.split("  ")]
    every = ["reward", "gold", "kl", "held-out", "length", "tok/s"]
    gone = {None: 0, 75: 0, 74: 1, 63: 1, 62: 2, 50: 2, 49: 3}[room]
    assert labels == [label for label in every if label not in ("length", "tok/s", "kl")[:gone]]


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_stage_that_an_error_ended_is_not_shown_as_finished(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, progress = in_terminal(160, monkeypatch) if kind == "rich" else in_file()
    progress.stage("starting Ray")
    progress.stage("starting 1 rollout worker")
    progress.close(stopped=True)
    progress.close(stopped=True)
    seen = stream.getvalue()
    assert seen.count("stopped after ") == 1
    assert re.search(r"starting 1 rollout worker: stopped after \d+\.\d s", seen)
    assert re.search(r"starting Ray: \d+\.\d s", seen)


@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_note_is_a_line_and_no_warning(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, progress = in_terminal(160, monkeypatch) if kind == "rich" else in_file()
    progress.note("resumed from step 40 [of 80]")
    progress.close()
    assert "resumed from step 40 [of 80]" in stream.getvalue() and "warning" not in stream.getvalue()
