"""A real run that is continued with another number of learner ranks and another ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import make_workplace

from rlhf_dist.models.checkpoints import problems

pytestmark = [pytest.mark.faults, pytest.mark.engines, pytest.mark.timeout(600)]
LAYOUTS = (("2", "2"), ("1", "0"), ("2", "3"))


def test_it_goes_on_with_another_number_of_ranks_and_another_stage(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    run = place.output / "moves"
    for number, (ranks, stage) in enumerate(LAYOUTS, start=1):
        resume = ["--resume"] if number > 1 else []
        keys = [f"learner.ranks={ranks}", f"learner.zero_stage={stage}", f"loop.steps={number}", "eval.every=0"]
        done = place.run("train", *resume, "name=moves", "rollout.workers=1", *keys)
        assert done.code == 0, done.stderr
        newest = run / "checkpoints" / f"step-{number}"
        assert problems(newest) == [] and len(list(newest.glob("optimizer-*"))) == int(ranks)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(abs(line["policy/loss"]) < 1.0 for line in lines[1:])
