"""`rlhf-dist bench relay`: figures by hand, a small run, wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import relay as bench

from rlhf_dist.errors import InputError


def test_figures_by_hand() -> None:
    found = bench.summary(10**9, [0.5, 0.4, 9.0], [0.9, 1.0, 1.2])
    assert (found["plain_s"], found["ours_s"], found["ratio"]) == (0.5, 1.0, 2.0)
    assert found["reached"] == {"ratio": True}
    assert "relay             1.000     1.00" in bench.table(found)
    assert not bench.summary(1, [0.4], [1.0])["reached"]["ratio"]


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--mib", "32", "--runs", "2", "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bytes"] == 32 * 2**20 and len(found["runs"]["ours_s"]) == 2 and found["ours_s"] > 0
    assert "ratio = relay / plain socket" in capsys.readouterr().out


def test_wrong_words_are_refused() -> None:
    with pytest.raises(InputError, match="16 or more"):
        bench.parse(["--mib", "8"])
