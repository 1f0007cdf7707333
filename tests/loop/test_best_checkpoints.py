"""Checkpoints that stay because they are the best, and the file that names the best one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import lines
from test_loop_rl_training import CONFIG, close, whole, wired
from test_run_directory import make

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import load
from rlhf_dist.errors import ConfigError
from rlhf_dist.loop.best_checkpoints import Best
from rlhf_dist.loop.rl_training import train
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.models.checkpoints import checkpoint_steps

HIGHEST = Best(2, "eval/reward", lowest=False)


def judged(
    run: RunDirectory, step: int, reward: float, best: Best | None = HIGHEST, keep: int = 1, **more: Any
) -> Path:
    """A checkpoint with an evaluation of its step."""
    run.begin_checkpoint(step)
    state = {"step": step, "results": {"eval/reward": reward}, "evaluated": step} | more
    return run.commit_checkpoint(step, keep, state, best=best)


def best_and_all(run: RunDirectory) -> tuple[str, list[int]]:
    best = run.best_checkpoint()
    return best.name if best else "", checkpoint_steps(run.checkpoints)


def test_the_best_checkpoints_stay_beside_the_newest(tmp_path: Path) -> None:
    run = make(tmp_path)
    found = []
    for step, reward in enumerate((0.5, 0.9, 0.7, 0.9, math.nan, 0.8), start=1):
        judged(run, step, reward)
        found.append(best_and_all(run))
    assert found == [
        ("step-1", [1]),
        ("step-2", [1, 2]),
        ("step-2", [2, 3]),
        ("step-2", [2, 4]),  # of equal ones the earlier is the best
        ("step-2", [2, 4, 5]),
        ("step-2", [2, 4, 6]),
    ]
    assert (
        run.checkpoints / "BEST"
    ).read_text() == "step-2\n" and run.latest_checkpoint() == run.checkpoints / "step-6"


def test_the_lowest_may_be_the_best_and_what_has_no_evaluation_of_its_own_is_not(tmp_path: Path) -> None:
    run, best = make(tmp_path), Best(1, "eval/reward", lowest=True)
    judged(run, 1, 0.5, best)
    judged(run, 2, 0.1, best, evaluated=1)
    judged(run, 3, 0.1, best, results={})
    assert best_and_all(run) == ("step-1", [1, 3])
    (run.checkpoints / "step-1" / "state.json").write_text("{}")
    judged(run, 4, 0.3, best)
    assert best_and_all(run) == ("step-4", [4]), "a state that cannot be read says nothing"


def test_best_names_nothing_where_nobody_asks_or_the_run_went_back(tmp_path: Path) -> None:
    run = make(tmp_path)
    first = judged(run, 1, 0.5)
    judged(run, 2, 0.9)
    run.go_back_to(first)
    assert best_and_all(run) == ("", [1]) and not (run.checkpoints / "BEST").exists()
    judged(run, 2, 0.4)
    assert best_and_all(run) == ("step-1", [1, 2])
    run.go_back_to(first)
    assert best_and_all(run) == ("step-1", [1]), "it is still there"
    judged(run, 3, 0.4, best=None)
    assert best_and_all(run) == ("", [3]) and not (run.checkpoints / "BEST").exists()


def test_the_best_checkpoint_is_named_and_a_metric_that_no_evaluation_has_ends_the_run(tmp_path: Path) -> None:
    loop = replace(CONFIG.loop, keep_checkpoints=1, keep_best=1, best_metric="eval/greedy_accuracy")
    run = whole(tmp_path / "best", replace(CONFIG, loop=loop))
    assert run.directory.best_checkpoint() == run.directory.checkpoints / "step-2", "the earlier of two alike"
    said = [event["message"] for event in lines(run.directory.events) if event["kind"] == "checkpoint"]
    assert [text.endswith(", the best so far") for text in said] == [True, False]
    assert checkpoint_steps(run.directory.checkpoints) == [2, 4]
    wrong = wired(tmp_path / "wrong", replace(CONFIG, loop=replace(loop, best_metric="eval/gold")))
    with pytest.raises(
        ConfigError, match=r"loop\.best_metric is eval/gold, which .* they have eval/distinct_responses, "
    ):
        train(wrong, None)
    close(wrong)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["loop.keep_best=1", "eval.every=3", "loop.checkpoint_every=40"],
            ["loop.keep_best is 1", "the last, 100,", "eval.every 3", "loop.checkpoint_every 40", "a multiple of it"],
        ),
        (["loop.keep_best=1", "eval.every=0"], ["loop.keep_best is 1", "eval.every 0"]),
        (["loop.best_is=lowest"], ["loop.best_is is lowest", "no effect with loop.keep_best 0"]),
    ],
)
def test_keys_that_would_have_no_effect_are_refused(tmp_path: Path, overrides: list[str], parts: list[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("")
    (problem,) = problems(load(path, overrides), "train")
    assert all(part in problem for part in parts)
    assert problems(load(path, ["loop.keep_best=1", "eval.every=20", "loop.checkpoint_every=40"]), "train") == []
