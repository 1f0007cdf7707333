import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_dist.errors import DataError, DiskError
from rlhf_dist.telemetry import names, report

BEFORE = {"eval/greedy_accuracy": 0.5, "eval/pass_at_4": 0.75, "eval/prompts": 256.0}
AFTER = {"eval/greedy_accuracy": 0.9375, "eval/response_length": 5.5, "eval/prompts": 256}


def write(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_before_after_in_plain_text() -> None:
    assert report.before_after_text(BEFORE, AFTER).splitlines() == [
        "held out         before  after  change",
        "--------------------------------------",
        "greedy accuracy   0.500  0.938  +0.438",
        "response length       -  5.500       -",
        "prompts             256    256  +0.000",
        "pass@4            0.750      -       -",
    ]


def test_next_to_nothing_below_zero_is_shown_as_zero() -> None:
    (row,) = report.compare({names.EVAL_GREEDY: 0.0}, {names.EVAL_GREEDY: -0.0001})
    assert (row.after, row.change) == ("0.000", "+0.000")


def test_before_after_in_a_terminal() -> None:
    stream = StringIO()
    Console(file=stream, width=80).print(report.before_after_table(BEFORE, AFTER))
    assert "greedy accuracy" in stream.getvalue() and "+0.438" in stream.getvalue()


def test_curves_of_a_reinforcement_run(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": 0, names.EVAL_GREEDY: 0.5, "eval/pass_at_4": 0.7}]
    for step in range(1, 31):
        rows.append(
            {
                "step": step,
                names.REWARD_MEAN: step / 30,
                names.RESPONSE_LENGTH: 5.0,
                names.LOGPROB_DIFF_MAX: 0.0 if step == 3 else 1e-6 * step,
                names.LOGPROB_DIFF_MEAN: 1e-7,
                names.ENTROPY: "nan" if step == 4 else 1.0,
                names.TOKENS_PER_S: 800.0,
            }
        )
    rows.append({"step": 30, names.EVAL_GREEDY: 0.9, "eval/pass_at_4": 0.95})
    metrics = write(tmp_path / "metrics.jsonl", *rows)
    titles = report.curves(metrics, tmp_path / "curves.png")
    assert len(titles) == 6 and "Loss" not in titles
    held_out = next(panel for panel in report.PANELS if panel.title == "Held-out accuracy")
    lines = report.found_lines(held_out, report.read_metrics(metrics))
    assert lines == [(names.EVAL_GREEDY, "greedy"), ("eval/pass_at_4", "pass@4")]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_run_with_critic_reference_and_gold_reward_are_a_grid_of_nine(tmp_path: Path) -> None:
    drawn = (
        names.REWARD_MEAN,
        names.REWARD_PROXY,
        names.REWARD_GOLD,
        names.KL_REFERENCE,
        names.KL_COEF,
        names.CRITIC_LOSS,
        names.CRITIC_EXPLAINED_VARIANCE,
        names.RESPONSE_LENGTH,
        names.DISTINCT_RESPONSES,
        names.DISTINCT_PAIRS,
        names.LOGPROB_DIFF_MAX,
        names.ENTROPY,
        names.TOKENS_PER_S,
        names.EVAL_GREEDY,
        names.EVAL_REWARD,
        names.EVAL_GOLD,
        names.EVAL_KL,
    )
    rows: list[dict[str, object]] = [{"step": step, **dict.fromkeys(drawn, 0.5)} for step in (1, 2)]
    metrics = write(tmp_path / "metrics.jsonl", *rows)
    assert report.curves(metrics, tmp_path / "curves.png") == (
        "Reward of sampled responses",
        "Held-out accuracy",
        "KL to the reference",
        "Critic's explained variance",
        "Response length",
        "Different from each other",
        "Rollout/learner logprob difference",
        "Policy entropy",
        "Speed",
    )
    series = report.read_metrics(metrics)
    labels = {panel.title: [label for _, label in report.found_lines(panel, series)] for panel in report.PANELS}
    assert labels["Reward of sampled responses"] == ["total", "gold", "gold, held out"]
    assert labels["KL to the reference"] == ["train", "held out"]


def test_curves_of_a_reward_model(tmp_path: Path) -> None:
    held_out = {names.REWARD_MODEL_HELD_OUT_LOSS: 0.6, names.REWARD_MODEL_ACCURACY: 0.7}
    metrics = write(tmp_path / "metrics.jsonl", {"step": 10, names.REWARD_MODEL_LOSS: 0.69, **held_out})
    titles = report.curves(metrics, tmp_path / "curves.png")
    assert titles == ("Reward model loss", "Reward model accuracy, held out")


def test_a_supervised_run_shows_only_its_loss_and_an_empty_one_nothing(tmp_path: Path) -> None:
    metrics = write(
        tmp_path / "metrics.jsonl",
        {"step": 10, "sft/loss": 2.0},
        {"step": 20, "sft/loss": 1.0, "sft/held_out_loss": 1.1},
    )
    assert report.curves(metrics, tmp_path / "curves.png") == ("Loss",)
    (tmp_path / "empty.jsonl").write_text("")
    assert report.curves(tmp_path / "empty.jsonl", tmp_path / "none.png") == ()
    assert not (tmp_path / "none.png").exists()


def test_two_lines_of_one_step_join_and_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 2, "a": 1.0}, {"step": 1, "a": 0.0}, {"step": 2, "b": 3.0})
    with path.open("a") as file:
        file.write('{"step": 3, "a"')
    assert report.read_metrics(path) == {"a": ([1, 2], [0.0, 1.0]), "b": ([2], [3.0])}


def test_bad_metrics_and_bad_places_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {"step": 1, "sft/loss": 1.0}, {"loss": 1.0})
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not an object of numbers with a `step`"):
        report.curves(path, tmp_path / "curves.png")
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read: No such file"):
        report.read_metrics(tmp_path / "no.jsonl")
    write(path, {"step": 1, "sft/loss": 1.0})
    with pytest.raises(DiskError, match=r"curves\.png: cannot be written"):
        report.curves(path, tmp_path / "no" / "curves.png")
