"""What a run is warned of before it starts: by the plan it needs more memory than there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_dist.cluster import run_forecast
from rlhf_dist.cluster.run_forecast import Basis, does_not_fit
from rlhf_dist.config.schema import Config
from rlhf_dist.planning.forecast import gpu_rates
from rlhf_dist.planning.hardware import KINDS
from rlhf_dist.planning.placement import Machine, place
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
    said = does_not_fit(wanted, placement, Basis(KNOWN["Qwen/Qwen2.5-7B"], RATES, "the data sheet of L4-24G"))
    assert "a learner rank needs " in said and " GB of 24: set model.gradient_checkpointing" in said
