"""What `rlhf-dist bench push` measures, on the started engine of this folder. No speed is asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import real_engine

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import _push_side as side

from rlhf_dist.models.hf import load_model
from rlhf_dist.models.packed_policy import PackedPolicy
from rlhf_dist.rollout.vllm_engine import VllmEngine

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]
engine = real_engine.engine
FIRST = 80
"""A version that the mask of the engine follows."""


def test_pushes_with_requests_running_are_measured(
    tiny_model: Path, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "kv_after_push", engine.kv_after_push)  # set back, whatever `measure` sets
    monkeypatch.setattr(side, "STEPS", 4)
    learner = PackedPolicy(load_model(real_engine.longer(tiny_model), "float32", "segmented"))
    policy = side.Policy(learner, "float32", 64 * 1024, FIRST)
    try:
        found = side.measure(side.Generation(engine, real_engine.SAMPLING, 16), policy, 2, temperature=1.0)
    finally:
        policy.close()
    assert [one["mode"] for one in found["pushes"]] == ["keep", "recompute"] * 2
    for one in found["pushes"]:
        assert one["running"] == 16 and one["cached"] > 16 * side.PROMPT_CHARACTERS and one["pause_s"] > 0, one
    again, kept = found["parity"]["recompute"], found["parity"]["keep"]
    assert max(again["before"], again["after"], kept["before"]) <= 1e-5 and kept["after"] > 1e-4, found["parity"]
    assert found["bytes"] == 4 * found["parameters"] and min(found["limit"].values()) > 0
