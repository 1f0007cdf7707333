"""`rlhf-dist compare` for real: the shared run's start against what it came to, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, SharedRun

pytestmark = pytest.mark.timeout(600)
PROMPTS, SAMPLES = 12, 2


@pytest.fixture(scope="module")
def compared(shared_run: SharedRun) -> tuple[Path, Finished]:
    """In a directory beside the runs; one worker in place of two, which changes no answer."""
    last = f"{shared_run.path}/checkpoints/step-4"
    words = [f"{shared_run.workplace.output}/sft", last, "name=duel", "rollout.workers=1"]
    return shared_run.workplace.output / "duel", shared_run.workplace.run("compare", *words)


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


def test_it_says_who_wins_how_often(compared: tuple[Path, Finished]) -> None:
    folder, ended = compared
    assert ended.code == 0, ended.stderr
    (pair,) = figures(folder)["pairs"]
    assert (pair["first"], pair["second"]) == ("sft", "grpo/checkpoints/step-4")
    assert pair["wins"] + pair["ties"] + pair["losses"] == PROMPTS * SAMPLES and pair["prompts"] == PROMPTS
    rate = f"{pair['win_rate']:.2f} [{pair['low']:.2f}, {pair['high']:.2f}]"
    assert 0 <= pair["low"] <= pair["win_rate"] <= pair["high"] <= 1 and rate in ended.stdout
    assert f"{PROMPTS} held-out prompts, {SAMPLES} sampled responses each; judged by total" in ended.stdout
    assert f"page: {folder}/compare.html" in ended.stdout


def test_the_policies_say_what_they_said_in_the_runs_own_evaluations(
    compared: tuple[Path, Finished], shared_run: SharedRun
) -> None:
    """The same prompts, seeds, engine and scorers: so the same rewards, to the rounding."""
    summary = json.loads((shared_run.path / "summary.json").read_text())
    start, end = figures(compared[0])["policies"]
    assert start["score"] == pytest.approx(summary["before"]["eval/reward"], abs=1e-5)
    assert end["score"] == pytest.approx(summary["after"]["eval/reward"], abs=1e-5)


def test_all_answers_and_a_page_are_kept(compared: tuple[Path, Finished]) -> None:
    folder, _ = compared
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.jsonl",
        "compare.html",
        "compare.json",
        "config.yaml",
    ]
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [row["uid"] for row in rows] == [f"eval/{n}" for n in range(PROMPTS)]
    assert all(len(said) == SAMPLES for row in rows for said in row["responses"].values())
    scores = [one["score"] for row in rows for one in row["responses"]["sft"]]
    assert sum(scores) / len(scores) == pytest.approx(figures(folder)["policies"][0]["score"])
    page = (folder / "compare.html").read_text()
    assert "sft against grpo/checkpoints/step-4" in page and "<script" not in page
