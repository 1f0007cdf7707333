"""`rlhf-dist bench logprobs`: ratios by hand, a small run of the command, wrong input. No speed is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import logprobs as bench  # noqa: E402

from rlhf_dist.errors import InputError, RunError  # noqa: E402

HELD = bench.Side(2.0, 6.0, 16.0, 1000.0, {"entropy": 5.0})
CHUNKED = bench.Side(3.0, 7.0, 12.0, 100.0, {"entropy": 5.001})


def test_ratios_by_hand() -> None:
    found = {"held": HELD, "chunked": CHUNKED}
    assert bench.ratios(found) == {"memory": 0.1, "time": 1.25, "cpu": 0.75}
    shown = bench.table(bench.Size(1024, 2**18, 8, 256), found)
    assert "the logits are 1,024 MiB, of a chunk of 256 256 MiB" in shown
    assert "memory: 0.100 of the held logits'; at most 0.125" in shown and "time:   1.25 of theirs" in shown


def test_sides_that_computed_something_else_are_told() -> None:
    bench.require_same({"held": HELD, "chunked": CHUNKED})
    with pytest.raises(RunError, match="entropy is 5 with the logits held, nan in chunks"):
        bench.require_same({"held": HELD, "chunked": bench.Side(1.0, 1.0, 1.0, 1.0, {"entropy": float("nan")})})


def test_a_small_run_takes_a_fraction_of_the_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three times the logits against those of a chunk, three head gradients of 12 MiB."""
    assert bench.main(["--quick", "--runs", "1", "--out", str(tmp_path / "found.json")]) == 0
    saved = json.loads((tmp_path / "found.json").read_text())
    (held,), (chunked,) = (saved["runs"][side] for side in bench.SIDES)
    assert held["peak_mib"] > 2.5 * bench.QUICK.logits_mib, "195 MiB each"
    assert chunked["peak_mib"] < 0.2 * held["peak_mib"]
    assert "memory: " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [tmp_path / "found.json"], "no logs are left"


def test_nothing_to_compute_is_refused() -> None:
    with pytest.raises(InputError, match=r"'0' is not a whole number of 1 or more"):
        bench.parse(["--tokens", "0"])
    assert bench.parse(["--quick", "--chunk", "8"]).chunk == 8
    assert bench.parse([]).tokens == 8192
