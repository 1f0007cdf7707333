"""Which model a process that is started again begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_dist.cluster.roster import with_a_model
from rlhf_dist.cluster.spec import ActorSpec
from rlhf_dist.config.schema import Config


@pytest.fixture
def spec(tmp_path: Path) -> ActorSpec:
    """Of a run that was resumed from step 2, and has written steps 4 and 6 since."""
    for step in (4, 6):
        (tmp_path / "checkpoints" / f"step-{step}" / "hf").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step}" / "state.json").write_text("{}")
    (tmp_path / "checkpoints" / "LATEST").write_text("step-6\n")
    source, log = tmp_path / "checkpoints" / "step-2" / "hf", tmp_path / "logs" / "rollout-worker-0.log"
    return ActorSpec("rollout worker 0", Config(), str(source), "cpu", 1, str(log), 0, "")


def test_a_checkpoint_that_is_removed_is_replaced_by_the_newest(spec: ActorSpec, tmp_path: Path) -> None:
    assert with_a_model(spec) == replace(spec, source=str(tmp_path / "checkpoints" / "step-6" / "hf"))


def test_one_that_is_there_stays(spec: ActorSpec, tmp_path: Path) -> None:
    there = replace(spec, source=str(tmp_path / "checkpoints" / "step-4" / "hf"))
    assert with_a_model(there) is there


@pytest.mark.parametrize("source", ["org/model", "/elsewhere/model"])
def test_a_model_that_is_no_checkpoint_of_the_run_stays(spec: ActorSpec, source: str) -> None:
    assert with_a_model(replace(spec, source=source)).source == source
