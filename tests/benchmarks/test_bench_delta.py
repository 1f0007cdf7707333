"""`rlhf-dist bench delta`: figures by hand, a small run, wrong input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import delta as bench

from rlhf_dist.errors import ConfigError

SMALL = [
    *("model.tiny.hidden_size=64", "model.tiny.intermediate_size=96", "model.tiny.layers=1", "model.tiny.heads=2"),
    *("model.tiny.kv_heads=1", "--train", "3", "--warmup", "1", "--steps", "2"),
]


def test_figures_by_hand() -> None:
    times = {"mark_s": 0.5, "publish_s": 0.1, "send_s": 0.1, "whole_publish_s": 0.1, "whole_send_s": 0.1, "step_s": 1.0}
    one: dict[str, Any] = {"words": 40.0, "bytes": 160.0, "loss": 2.0} | times
    result = bench.summary({"parameters": 1000, "threads": 2, "losses": [3.0, 2.5], "rates": {"1e-06": one}})
    assert (result["rates"]["1e-06"]["changed"], result["rates"]["1e-06"]["share"]) == (0.04, 0.08)
    assert result["reached"] == {"bytes": True}
    assert "4.00%          0.080          500.0" in bench.table(result)
    large = {"parameters": 1000, "rates": {"1e-06": one | {"bytes": 300.0}}}
    assert not bench.summary(large)["reached"]["bytes"]


@pytest.mark.engines
@pytest.mark.faults  # for its time
@pytest.mark.timeout(300)
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*SMALL, "--out", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    shares = [one["share"] for one in found["rates"].values()]
    assert len(shares) == 7 and shares == sorted(shares), "the larger the rate, the more words change"
    assert 0 < shares[0] < 0.05 and shares[-1] > 0.2
    assert "1e-06" in capsys.readouterr().out


def test_what_it_sets_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the benchmark sets model\.dtype itself; take it out"):
        bench.parse(["model.dtype=float32"])
