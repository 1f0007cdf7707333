"""`rlhf-dist bench telemetry`: by hand, and wrong input."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import telemetry as bench

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import load
from rlhf_dist.errors import InputError, RunError


def test_figures_by_hand() -> None:
    """Steps of 1 s; logging takes 10 ms, once 90, and the first row tells of what came before the warm-up's end."""
    rows = [{"time/step": 1.0, "time/log": seconds} for seconds in (9.0, 9.0, 0.01, 0.01, 0.09, 0.01)]
    cpu = [(0, 0.0), (1, 0.5), (3, 0.52), (5, 0.54)]
    found = bench.summary(rows, 1, cpu)
    assert found["steps"] == 4 and found["step_s"] == 1.0 and found["log_s"] == pytest.approx(0.03)
    assert found["share"] == pytest.approx(0.03) and found["reached"] == {"share": False}
    assert found["wandb_cpu_s"] == pytest.approx(0.01) and found["log_s_largest"] == 0.09
    assert "logging, in its way                       30.0      3.00%  (at most 2% asked)" in bench.table(found)
    with pytest.raises(RunError, match="none is left"):
        bench.summary(rows[:2], 1, cpu)


def test_its_config_is_right_and_has_every_sink() -> None:
    config = load(bench.CONFIG, list(bench.OWN))
    assert problems(config, "train") == []
    assert config.telemetry.wandb == "offline" and config.telemetry.tensorboard and config.telemetry.prometheus_port


def test_wrong_words_are_refused() -> None:
    with pytest.raises(InputError, match="20 or more"):
        bench.parse(["--steps", "5"])
