"""`rlhf-dist bench label`: figures by hand, what it must notice, and wrong input."""

from __future__ import annotations

import argparse
import shutil
import sys
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import label as bench

from rlhf_dist.errors import InputError
from rlhf_dist.labels.leases import LabelQueue, Said
from rlhf_dist.labels.store import LabelStore

RIGHT = {"stored": 2, "lost": 0, "doubled": 0, "leases": 0}


def test_figures_by_hand() -> None:
    args = argparse.Namespace(items=5000, seconds=2)
    steady, killed = bench.Seen(["a", "b"], [0.01, 0.03]), bench.Seen(["c"], [0.5])
    found = bench.summary(args, [20.0, 40.0, 30.0], steady, RIGHT, killed, RIGHT)
    assert found["click_ms"] == {"p50": 30.0, "p95": 40.0, "max": 40.0} and found["decisions_per_s"] == 1.0
    assert found["reached"] == {"click": True, "exact": True}
    shown = bench.table(found)
    assert "click to next item on the screen                 30.0     40.0     40.0   (below 100 asked)" in shown
    assert "killed in the middle: 1 acknowledged, 0 lost, 0 doubled, 0 leases wrong" in shown
    found = bench.summary(args, [], steady, RIGHT | {"lost": 1}, killed, RIGHT)
    assert found["reached"] == {"click": True, "exact": False} and "no Chromium here" in bench.table(found)


def test_what_is_lost_doubled_or_not_exact_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bench.fill(path, 5)
    with closing(LabelStore(path)) as store:
        queue = LabelQueue(store, 60, 0)
        lease = queue.ask("ann")
        assert lease is not None and queue.decide("ann", lease.key, Said("tie", "", ())) is not None
    seen = bench.Seen([lease.key], [0.1])
    assert bench.compare(path, seen) == {"stored": 1, "lost": 0, "doubled": 0, "leases": 0}
    assert bench.compare(path, bench.Seen(["other", lease.key, lease.key], []))["lost"] == 1
    assert bench.compare(path, bench.Seen(["other", lease.key, lease.key], []))["doubled"] == 1
    wrong = Path(shutil.copy(path, tmp_path / "wrong"))
    with closing(LabelStore(wrong)) as store, store.writing() as db:
        db.execute("UPDATE items SET open = open + 1 WHERE id = 1")
    assert bench.compare(wrong, seen)["leases"] == 1


@pytest.mark.parametrize("words", [["--items", "5"], ["--seconds", "0"], ["more"]])
def test_wrong_input(words: list[str]) -> None:
    with pytest.raises(InputError):
        bench.parse(words)
