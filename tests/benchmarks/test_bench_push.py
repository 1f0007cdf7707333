"""`rlhf-dist bench push`: figures by hand, and wrong input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import push as bench  # noqa: E402

from rlhf_dist.errors import InputError  # noqa: E402

AGREE = {"before": 2e-6, "after": 3e-6, "after_mean": 1e-6}


def pushes(mode: str, *pauses: float) -> list[dict[str, Any]]:
    rest = {
        "running": 64,
        "cached": 2000,
        "publish_s": 0.05,
        "slowed_s": 0.2,
        "slowest_s": 0.1,
        "resume_s": 0.4,
        "step_s": 0.04,
    }
    return [{"mode": mode, "pause_s": pause} | rest for pause in pauses]


def test_figures_by_hand() -> None:
    found = {
        "pushes": [*pushes("keep", 0.09, 0.08, 0.3), *pushes("recompute", 0.1)],
        "parity": {"keep": AGREE | {"after": 0.2}, "recompute": AGREE},
        "limit": {"hash_s": 0.01, "copy_s": 0.03},
        "parameters": 25_200_000,
        "bytes": 100_800_000,
        "threads": 2,
    }
    result = bench.summary(found)
    assert (result["sides"]["keep"]["pause_s"], result["sides"]["keep"]["longest_pause_s"]) == (0.09, 0.3)
    assert result["reached"] == {"pause": True, "parity": True}
    shown = bench.table(result)
    assert (
        "keep               90.0       300.0       400.0        40.0       200.0       100.0     2.0e-06     2.0e-01"
        in shown
    )
    assert "limit              40.0: hash 10.0, copy 30.0" in shown and "25.2M parameters, 96 MiB" in shown
    assert "pause of keep: 90.0 ms (at most 100 asked); logprobs of recompute agree to 3.0e-06" in shown
    found["parity"]["recompute"] = AGREE | {"before": 2e-5}
    assert bench.summary(found)["reached"] == {"pause": True, "parity": False}


def test_wrong_words_are_refused() -> None:
    with pytest.raises(InputError, match="1 or more"):
        bench.parse(["--requests", "0"])
    with pytest.raises(InputError, match="not of the form"):
        bench.parse(["grpo.yaml"])
    with pytest.raises(InputError, match=r"rollout\.kv_after_push=keep: .* itself; take it out"):
        bench.parse(["rollout.kv_after_push=keep"])
