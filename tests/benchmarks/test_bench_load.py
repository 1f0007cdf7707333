"""`rlhf-dist bench load`: figures by hand, a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import load as bench

SMALL = [
    *("model.tiny.hidden_size=64", "model.tiny.intermediate_size=96", "model.tiny.layers=1", "model.tiny.heads=2"),
    *("model.tiny.kv_heads=1", "--rounds", "1", "--engines", "2", "--threads", "1", "--entries", "200"),
]


def push(publish_s: float, *cpu_s: float) -> dict[str, Any]:
    loads = [
        {"load_s": 0.3, "cpu_s": one, "copies_cpu_s": one / 2, "kernel_s": one / 10, "faults": 100} for one in cpu_s
    ]
    return {"bytes": 10**9, "copy_s": 0.05, "publish_s": publish_s, "loads": loads}


def test_figures_by_hand() -> None:
    together = [push(0.1, 0.5, 0.6), push(0.1, 0.6, 0.7)]
    found = bench.summary({"fast": [push(0.1, 9.0)], "alone": [push(0.1, 0.5)], "together": together}, 2)
    assert (found["copies"], found["cpu_alone_s"], found["cpu_together_s"]) == (8.0, 0.5, 0.6)
    assert found["reached"] == {"copies": True, "cpu": False}
    assert found["copy_cpu_ratio"] == pytest.approx(1.2)
    assert found["kernel"]["together"] == pytest.approx({"kernel_s": 0.06, "faults": 100})
    assert "a push is 8.0 copies" in bench.table(found) and "of plain copies 1.20 times" in bench.table(found)


@pytest.mark.engines
@pytest.mark.faults  # for its time
@pytest.mark.timeout(400)
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [len(found["runs"][kind][0]["loads"]) for kind in ("fast", "alone", "together")] == [1, 1, 2]
    assert found["copies"] > 0 and found["cpu_ratio"] > 0
    assert "at most 8 asked" in capsys.readouterr().out
