"""The table at the end of a pipeline: whose figures stand in which row, and how they are shown."""

from __future__ import annotations

import io
import json
from dataclasses import replace

from rlhf_dist.telemetry.comparison import StageResult, Wins, as_json, as_text, compare_stages, printable, show

BEFORE = {"eval/gold": 0.5, "eval/gold_std": 2.0, "eval/reward": 0.1, "eval/kl": 0.0, "eval/response_length": 5.0}
AFTER = {"eval/gold": 4.5, "eval/gold_std": 1.0, "eval/reward": 1.9, "eval/kl": 7.0, "eval/response_length": 6.0}
ANSWERS = {"prompts": ["describe a"], "before": ["bad"], "after": ["nice"]}


def results() -> list[StageResult]:
    return [
        StageResult("sft", "sft", "tiny", {"after": {"sft/held_out_loss": 1.25}}, 40.0),
        StageResult("reward", "reward", "sft", {"after": {"accuracy": 0.71, "best_accuracy": 0.73}}, 50.0),
        StageResult("ppo", "train", "sft", {"before": BEFORE, "after": AFTER, "answers": ANSWERS}, 60.0),
        StageResult("grpo", "train", "sft", {"before": {}, "after": {"eval/kl": float("nan")}}, 70.0),
    ]


def test_each_row_has_its_own_figures() -> None:
    sft, reward, ppo, grpo = compare_stages(results()).rows
    assert (sft.gold, sft.lift, sft.proxy, sft.kl, sft.length) == (0.5, None, 0.1, 0.0, 5.0), "ppo's, before it began"
    assert (ppo.gold, ppo.lift, ppo.proxy, ppo.kl, ppo.length) == (4.5, 2.0, 1.9, 7.0, 6.0), "(4.5 - 0.5) / 2"
    assert (reward.gold, reward.note) == (None, "accuracy 0.710 (best 0.730)")
    assert (grpo.gold, grpo.lift, grpo.seconds) == (None, None, 70.0)
    assert compare_stages(results()).seconds == 220.0


def test_a_start_that_no_stage_made_has_a_row_too() -> None:
    only = StageResult("rl", "train", "some/model", {"before": BEFORE, "after": AFTER}, 1.0)
    start, rl = compare_stages([only]).rows
    assert (start.model, start.gold, start.seconds) == ("some/model", 0.5, None)
    assert (rl.model, rl.lift) == ("rl", 2.0)


def test_a_line_says_how_often_a_model_beats_its_start() -> None:
    ppo = replace(results()[2], wins=Wins("truth", 0.875, 0.8, 0.92, 0.86, 0.79, 0.91))
    grpo = replace(results()[3], wins=Wins("total", 0.5, 0.4, 0.6, None, None, None))
    found = compare_stages([*results()[:2], ppo, grpo])
    lines = as_text(found).splitlines()
    assert "ppo against sft: wins 0.88 [0.80, 0.92], at equal length 0.86 [0.79, 0.91] (by truth)" in lines
    assert "grpo against sft: wins 0.50 [0.40, 0.60] (by total)" in lines
    written = json.loads(json.dumps(as_json(found)))["wins"]
    assert [(one["model"], one["start"], one["win_rate"]) for one in written] == [
        ("ppo", "sft", 0.875),
        ("grpo", "sft", 0.5),
    ]
    assert "against" not in as_text(compare_stages(results()))


def test_a_start_without_spread_gives_no_lift() -> None:
    before = BEFORE | {"eval/gold_std": 0.0}
    assert (
        compare_stages([StageResult("rl", "train", "x", {"before": before, "after": AFTER}, 1.0)]).rows[1].lift is None
    )


def test_next_to_nothing_below_zero_is_shown_as_zero() -> None:
    after = AFTER | {"eval/gold": 0.4999, "eval/reward": -0.001, "eval/kl": -0.004}
    text = as_text(compare_stages([StageResult("rl", "train", "x", {"before": BEFORE, "after": after}, 1.0)]))
    row = next(line for line in text.splitlines() if line.startswith("| rl"))
    assert [cell.strip() for cell in row.strip("|").split("|")][1:5] == ["0.50", "+0.00", "0.00", "0.00"]


def test_answers_stand_side_by_side_under_the_same_prompts() -> None:
    other = {"prompts": ["describe b", "describe a"], "before": ["-", "bad"], "after": ["?", "warm"]}
    found = compare_stages([*results(), StageResult("dr", "train", "sft", {"answers": other}, 1.0)]).answers
    assert found.prompts == ("describe a",)
    assert found.by_model == {"sft": ("bad",), "ppo": ("nice",), "dr": ("warm",)}


def test_text_and_json_have_it_all() -> None:
    comparison = compare_stages(results())
    lines = as_text(comparison).splitlines()
    row = next(line for line in lines if line.startswith("| ppo"))
    assert [cell.strip() for cell in row.strip("|").split("|")][:7] == [
        "ppo",
        "4.50",
        "+2.00",
        "1.90",
        "7.00",
        "6.00",
        "1m00s",
    ]
    assert next(line for line in lines if line.startswith("| reward")).count(" - ") == 5
    assert lines[-1] == "all stages: 3m40s"
    data = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert data["models"][3]["kl"] == "nan" and data["answers"]["by_model"]["ppo"] == ["nice"]


def test_a_file_gets_plain_text() -> None:
    stream = io.StringIO()
    show(compare_stages(results()), stream)
    assert stream.getvalue().isascii() and "held-out loss 1.250" in stream.getvalue()


def test_an_answer_cannot_move_the_cursor() -> None:
    assert printable("a\x1b[31mb\nc\udc80\u00e9") == "a\\x1b[31mb\nc\\udc80\u00e9"
