"""`rlhf-dist bench pack`: figures by hand, a small run of the command, wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pack as bench  # noqa: E402

from rlhf_dist.errors import InputError  # noqa: E402


def test_figures_by_hand() -> None:
    """Ranks [6, 2] and [5, 4] of budget 6: two passes each, and 17 of 24 slots."""
    found = bench.judge(np.array([6, 5, 4, 2]), ranks=2, budget=6)
    assert found.micro_batches == 2 and found.efficiency == 17 / 24
    assert found.limit == 17 / 24, "8.5 tokens a rank do not fit in one"
    assert found.imbalance == pytest.approx(9 / 8.5 - 1)
    assert found.lockstep == pytest.approx(17 / (2 * (6 + 4)))
    one = bench.judge(np.array([3, 3]), ranks=1, budget=3)
    assert (one.efficiency, one.limit, one.imbalance, one.lockstep) == (1.0, 1.0, 0.0, 1.0)


def test_several_batches_have_means_and_the_worst_imbalance() -> None:
    made = [bench.Figures(n, 0.5, 1.0, n / 10, 1.0, float(n)) for n in (1, 3)]
    assert bench.Figures.over(made) == bench.Figures(2.0, 0.5, 1.0, 0.3, 1.0, 3.0)


def test_groups_share_their_prompt() -> None:
    lengths = bench.draw_groups(np.random.default_rng(0), 4, 8).reshape(4, 8)
    assert ((lengths.min(1) > 9) & (lengths.max(1) <= 300 + bench.RESPONSE_LIMIT)).all()
    assert len(set(lengths.flatten().tolist())) > 20


def test_the_command_prints_the_table_and_saves_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where enough tokens are there to fill micro-batches, the asked figures are reached."""
    assert bench.main(["--batches", "2", "--out", str(tmp_path / "pack.json")]) == 0
    saved = json.loads((tmp_path / "pack.json").read_text())
    assert len(saved["rows"]) == len(bench.DRAWS) * len(bench.SHAPES) * len(bench.RANKS)
    for row in saved["rows"]:
        assert row["imbalance"] <= bench.TARGET_IMBALANCE, row
        assert row["efficiency"] >= bench.TARGET_EFFICIENCY or row["limit"] < bench.TARGET_EFFICIENCY + 0.02, row
        assert 0 < row["efficiency"] <= row["limit"] <= 1, row
    shown = capsys.readouterr().out
    assert "groups       8x8      1" in shown and "imbalance of at most 2%: 40 of 40 lines" in shown


def test_a_budget_below_the_longest_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"'100' is not a whole number of 1324 or more"):
        bench.parse(["--budget", "100"])
