"""`rlhf-dist bench chaos`: a small run of the command, a replay of one that fails, wrong input."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from chaos.search import uncut  # noqa: E402

from rlhf_dist.errors import InputError  # noqa: E402
from rlhf_dist.loop.run_directory import RunDirectory  # noqa: E402


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """As the command loads it: its neighbours in `chaos/` have the shorter name."""
    spec = importlib.util.spec_from_file_location("benchmark_chaos", BENCHMARKS / "chaos.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_few_seeds(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "chaos.json"
    assert bench.main(["--seeds", "45", "--first", "100", "--jobs", "2", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert (result["first"], result["seeds"], result["jobs"], result["failing"]) == (100, 45, 2, {})
    assert result["endings"]["finished"] >= 45 and result["starts"] == sum(result["endings"].values())
    assert result["faults_of_members"] and result["durable_writes"] > 45 * 20 and result["machine"]["cpus"] >= 1
    assert "seeds that fail                       0" in capsys.readouterr().out


def test_a_seed_that_fails_is_made_small_and_says_how_to_replay_it(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(RunDirectory, "rewind_metrics", lambda *_: 0)
    uncut.cache_clear()
    out = tmp_path / "chaos.json"
    assert bench.main(["--seeds", "20", "--jobs", "1", "--out", str(out)]) == 1
    failing = json.loads(out.read_text())["failing"]
    assert failing and all(text.startswith("metrics: metrics.jsonl has steps ") for text in failing.values())
    seed = next(iter(failing))
    told = capsys.readouterr().out
    assert f"replay: rlhf-dist bench chaos --seed {seed}\n" in told and "the smallest that fails so:\n" in told
    assert bench.main(["--seed", seed]) == 1
    again = capsys.readouterr().out
    assert again in told, "a replay says the same"
    monkeypatch.undo()
    assert bench.main(["--seed", seed]) == 0 and "  all holds: " in capsys.readouterr().out
    uncut.cache_clear()


def test_no_more_seeds_are_begun_once_the_time_is_over(bench: ModuleType) -> None:
    assert list(bench.blocks(0, 45, None)) == [range(20), range(20, 40), range(40, 45)]
    assert list(bench.blocks(0, 45, 0.0)) == []


@pytest.mark.parametrize("words", [["--seeds", "0"], ["--jobs", "x"], ["loop.steps=3"], ["--seed", "-1"]])
def test_wrong_input(bench: ModuleType, words: list[str]) -> None:
    with pytest.raises(InputError):
        bench.main(words)
