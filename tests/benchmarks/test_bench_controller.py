"""`rlhf-dist bench controller`: figures by hand, and wrong input. A small run of it is in `test_cluster_events.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import controller as bench

from rlhf_dist.errors import InputError


def test_figures_by_hand() -> None:
    """The middle of three runs counts, with its own bare call; 100 samples were sent 1,000 bytes, answered 20,000."""
    runs = [bench.Run(1, 400.0, 40.0, 900.0), bench.Run(256, 660.0, 110.0, 990.0)]
    runs += [bench.Run(1, 500.0, 100.0, 900.0), bench.Run(256, 500.0, 100.0, 990.0)]
    runs += [bench.Run(1, 900.0, 150.0, 900.0), bench.Run(256, 560.0, 100.0, 990.0)]
    found = bench.summary(runs, {"post": [400, 600], "events": [20_000]}, samples=100)
    assert [(line["workers"], line["cpu_us"], line["calls"]) for line in found["lines"]] == [
        (1, 500.0, 5.0),
        (256, 560.0, 5.6),
    ]
    assert found["growth"] == pytest.approx(1.12)
    assert found["messages"] == {
        "post": {"sample": 10.0, "largest": 600},
        "events": {"sample": 200.0, "largest": 20_000},
    }
    assert found["bytes_per_sample"] == 210.0
    assert found["reached"] == {"cpu": True, "growth": True, "bytes": True}
    shown = bench.table(found)
    assert "     256         560             100            5.6      990" in shown
    assert "210 bytes a sample" in shown and "from 1 to 256 workers 1.12 times" in shown


@pytest.mark.parametrize(("words", "match"), [(["--workers", "0"], "1 or more"), (["--steps", "1"], "2 or more")])
def test_wrong_words_are_refused(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        bench.parse(words)
