"""What the learner's ranks share and where its optimizer lies: combinations that have no effect are rejected."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import load

OFFLOADED = ("learner.offload=optimizer", "learner.zero_stage=2")


def found(tmp_path: Path, *overrides: str) -> list[str]:
    path = tmp_path / "config.yaml"
    path.write_text("", encoding="utf-8")
    return problems(load(path, overrides), "sft")


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ((*OFFLOADED, "cluster.device=cpu"), "learner.offload is optimizer with cluster.device cpu"),
        (("learner.offload=optimizer",), "learner.offload is optimizer and has no effect with learner.zero_stage 0"),
        (
            ("learner.offload=optimizer", "learner.zero_stage=1", "model.dtype=bfloat16"),
            "learner.offload is optimizer and has no effect with learner.zero_stage 1",
        ),
    ],
)
def test_an_optimizer_that_cannot_be_moved_away_is_refused(
    tmp_path: Path, overrides: tuple[str, ...], part: str
) -> None:
    (problem,) = found(tmp_path, *overrides)
    assert part in problem and "set" in problem


def test_on_gpus_it_can(tmp_path: Path) -> None:
    assert found(tmp_path, *OFFLOADED, "cluster.device=cuda") == []
