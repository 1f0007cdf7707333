"""`rlhf-dist bench plan`: figures by hand, the smallest model on real ranks, wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import plan as bench

from rlhf_dist.errors import InputError


def test_figures_by_hand() -> None:
    """Without ZeRO 12 bytes a parameter are held: weights and two moments in float32."""
    case = bench.Case("3M", "float32", 1, 0, False, 2048, 256)
    count = bench.SHAPES["3M"].parameters
    row = bench.compared(case, {"held": 12 * count, "peak": 10**9})
    assert row["held"] == {"measured": 12 * count, "plan": 12 * count}
    assert row["ratio"] == pytest.approx(row["peak"]["plan"] / 1e9)
    assert "3M float32, 1 rank, ZeRO-0" in bench.table([row])


@pytest.mark.engines
@pytest.mark.faults  # for its time
def test_the_plan_of_real_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held between steps is exact; two ranks under ZeRO 1, whose state is shared."""
    monkeypatch.setattr(bench, "CASES", (bench.Case("3M", "float32", 2, 1, False, 1024, 64),))
    assert bench.main(["--out", str(tmp_path / "found.json")]) == 0
    (row,) = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert row["held"]["measured"] == pytest.approx(row["held"]["plan"], rel=0.02)
    assert row["ratio"] == pytest.approx(1, abs=0.2)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(InputError, match="--model"):
        bench.parse(["--model", "7B"])
