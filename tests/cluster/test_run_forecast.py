"""What a run is warned of before it starts, and the forecast beside what it measured at its end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_dist.cluster import run_forecast
from rlhf_dist.cluster.run_forecast import Basis, basis_before, compared, does_not_fit, lengths, steady
from rlhf_dist.config.schema import Config
from rlhf_dist.planning.forecast import Lengths, forecast, gpu_rates
from rlhf_dist.planning.hardware import KINDS
from rlhf_dist.planning.placement import Machine, Placement, place
from rlhf_dist.planning.shape import KNOWN

RATES: Any = gpu_rates(KINDS["L4-24G"], "bfloat16", True)


def test_a_machine_with_too_little_memory_is_told_and_a_clusters_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = replace(Config(), cluster=replace(Config().cluster, address="local", device="cpu"))
    found = Basis(KNOWN["Qwen/Qwen2.5-0.5B"], RATES, "2 CPU threads, measured")
    placement = place(wanted, Machine(4, 0), "train")
    monkeypatch.setattr(run_forecast, "memory_here", lambda: 8 * 10**9)
    said = does_not_fit(wanted, placement, found)
    assert said.startswith("a node with 1 rollout worker, 1 learner rank would need ") and "and have 8" in said
    monkeypatch.setattr(run_forecast, "memory_here", lambda: 10**12)
    assert does_not_fit(wanted, placement, found) == ""
    assert does_not_fit(wanted, placement, None) == ""
    monkeypatch.setattr(run_forecast, "memory_here", lambda: 8 * 10**9)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    joined = replace(wanted, cluster=replace(wanted.cluster, address="auto"))
    assert does_not_fit(joined, placement, found) == ""


def test_a_gpu_that_is_too_small_is_told() -> None:
    wanted = replace(Config(), cluster=replace(Config().cluster, address="local", colocate=False))
    placement = place(wanted, Machine(64, 2), "train")
    said = does_not_fit(wanted, placement, Basis(KNOWN["Qwen/Qwen2.5-7B"], RATES, "a data sheet", KINDS["L4-24G"]))
    assert "a learner rank needs " in said and " GB of 24: set model.gradient_checkpointing" in said


FOUND = Basis(KNOWN["Qwen/Qwen2.5-0.5B"], RATES, "2 CPU threads, measured")
STEP = {
    "rollout/response_length": 100.0,
    "rollout/response_length_max": 120.0,
    "learner/tokens": 128 * 150.0,
    "learner/trained_share": 0.5,
    "time/generate": 3.0,
    "time/train": 4.0,
    "time/value": 1.0,
    "time/sync": 2.0,
    "time/step": 10.0,
}
LENGTHS = Lengths(prompt=50, response=100, longest=120, trained=0.5)


def run_of(lag: int, colocate: bool) -> tuple[Config, Placement]:
    wanted = replace(Config(), loop=replace(Config().loop, max_policy_lag=lag))
    wanted = replace(wanted, cluster=replace(wanted.cluster, colocate=colocate, device="cpu"))
    return wanted, place(wanted, Machine(4, 0), "train")


def written(folder: Path, step: dict[str, float] = STEP) -> Path:
    """Five steps; the first took a hundred times as long."""
    path, slow = folder / "metrics.jsonl", {name: 100 * value for name, value in step.items() if "time" in name}
    each = [step | (slow if number == 1 else {}) | {"step": number} for number in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in each))
    return path


def test_the_forecast_stands_beside_the_median_of_the_steps_but_the_first(tmp_path: Path) -> None:
    wanted, placement = run_of(lag=0, colocate=True)
    line, summary = compared(wanted, placement, FOUND, written(tmp_path))
    planned = forecast(wanted, placement, FOUND.shape, RATES, LENGTHS, 10**9)
    assert {phase: both["measured"] for phase, both in summary.items()} == {
        "step": 10.0,
        "generate": 3.0,
        "train": 5.0,
        "push": 2.0,
    }
    forecasts = {phase: both["forecast"] for phase, both in summary.items()}
    assert forecasts["train"] == pytest.approx(planned.train, abs=1e-4)
    assert forecasts["generate"] == pytest.approx(planned.generate, abs=1e-4)
    assert forecasts["step"] == pytest.approx(planned.step, abs=1e-4)
    assert line.startswith(f"forecast, and (measured), s: step {planned.step:.3g} (10), generate ")
    assert line.endswith("; for the lengths of this run, from 2 CPU threads, measured")


def test_with_a_lag_the_learners_wait_is_compared_and_on_shared_threads_the_step_alone(tmp_path: Path) -> None:
    wanted, placement = run_of(lag=1, colocate=False)
    _, summary = compared(wanted, placement, FOUND, written(tmp_path))
    planned = forecast(wanted, placement, FOUND.shape, RATES, LENGTHS, 10**9)
    assert list(summary) == ["step", "wait", "train", "push"] and summary["wait"]["measured"] == 3.0
    wait = max(0.0, planned.generate - planned.train - planned.sync)
    assert summary["wait"]["forecast"] == pytest.approx(wait, abs=1e-4) and wait < planned.generate
    assert list(compared(*run_of(lag=1, colocate=True), FOUND, written(tmp_path))[1]) == ["step"]


def test_a_run_without_steps_has_no_line_and_arithmetic_that_fails_costs_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(lag=0, colocate=True)
    assert compared(*run, FOUND, tmp_path / "none.jsonl") == ("", {})
    assert compared(*run, FOUND, written(tmp_path, {"eval/greedy_accuracy": 0.5})) == ("", {})

    def fails(*_: object) -> None:
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(run_forecast, "forecast", fails)
    line, summary = compared(*run, FOUND, written(tmp_path))
    assert line.endswith("ZeroDivisionError: float division by zero") and summary == {}


def test_lengths_are_those_of_the_run() -> None:
    assert lengths(Config(), STEP) == LENGTHS
    assert lengths(Config(), {"rollout/response_length": 100.0}) == Lengths(1.0, 100.0, 100.0, 1.0)
    series = {"a": ([1, 2, 3, 4, 5], [9.0, 1.0, 2.0, 3.0, 4.0]), "none": (list[int](), list[float]())}
    assert steady(series) == {"a": 2.5}


def test_rates_are_measured_before_a_run_that_starts_its_own_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, _ = run_of(lag=0, colocate=True)
    own = replace(wanted, cluster=replace(wanted.cluster, address="local"))
    found = basis_before(own, "tiny")
    assert found and found.device.endswith(" CPU threads, measured") and found.capacity == 0
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert basis_before(replace(wanted, cluster=replace(wanted.cluster, address="auto")), "tiny") is None
    assert basis_before(own, "an/unknown-model") is None
