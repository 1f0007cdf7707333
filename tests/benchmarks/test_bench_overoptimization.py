"""`rlhf-dist bench overoptimization`: the toy, best of n over prompts, a pipeline's stages, a picture, wrong input."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import _best_of_n  # noqa: E402
import overoptimization as bench  # noqa: E402

from rlhf_dist.config.load import to_yaml  # noqa: E402
from rlhf_dist.config.schema import (  # noqa: E402
    ClusterConfig,
    Config,
    DataConfig,
    KLConfig,
    ModelConfig,
    RewardSpec,
    RolloutConfig,
    ScoringConfig,
    TaskConfig,
    TinyConfig,
)
from rlhf_dist.errors import ConfigError, DataError, InputError  # noqa: E402

SCORING = ScoringConfig(
    rewards={"learned": RewardSpec(kind="model", path="runs/my/reward"), "truth": RewardSpec(kind="gold", weight=0.0)},
    gold="truth",
)


def test_the_toy_keeps_below_the_formula_and_nears_it_with_more_responses() -> None:
    rows = _best_of_n.toy(64)
    small, large = _best_of_n.TOY_SIZES
    assert [row.n for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert rows[0].formula == 0.0 and rows[0].gold[large] == pytest.approx(0.0, abs=1e-9)
    assert rows[1].formula == pytest.approx(0.6931472 - 0.5)
    for row in rows[1:]:
        assert row.kl[small] < row.kl[large] < row.formula
        assert row.kl[large] == pytest.approx(row.formula, abs=0.01)
    for size in (small, large):
        gold = [row.gold[size] for row in rows]
        assert gold == sorted(gold)
    assert rows == _best_of_n.toy(64)


def test_best_of_n_is_the_mean_over_prompts() -> None:
    scores = [
        {"proxy": [1.0, 2.0], "gold": [0.0, 4.0]},  # the proxy agrees: best of two has gold 4
        {"proxy": [1.0, 2.0], "gold": [3.0, 1.0]},  # it errs: best of two has gold 1
    ]
    one, two = _best_of_n.best_of_n(scores)
    assert (one.n, one.kl, one.proxy, one.gold) == (1, 0.0, 1.5, 2.0)
    assert (two.n, two.proxy, two.gold) == (2, 2.0, 2.5)
    assert two.gold_error == pytest.approx(1.5)  # deviation 3 / sqrt 2, over sqrt 2 prompts
    (alone, _) = _best_of_n.best_of_n(scores[:1])
    assert alone.gold_error == 0.0


@given(st.lists(st.floats(-5, 5), min_size=8, max_size=8))
def test_the_expected_proxy_never_falls_with_n(values: list[float]) -> None:
    proxies = [row.proxy for row in _best_of_n.best_of_n([{"proxy": values, "gold": values}])]
    assert len(proxies) == 4
    assert all(b >= a - 1e-9 for a, b in pairwise(proxies))
    assert proxies[-1] == pytest.approx(max(values))


def test_smoothed_means_shrink_at_both_ends() -> None:
    assert bench.smoothed([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [2.0, 2.5, 3.0, 4.0, 4.5, 5.0]
    assert bench.smoothed([7.0]) == [7.0]


def a_stage(run: Path, name: str, config: Config, command: str = "train", steps: int = 6) -> None:
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "summary.json").write_text(json.dumps({"command": command}))
    rows = [{"step": 0, "eval/gold": 1.0}]
    rows += [
        {"step": i, "kl/reference": 0.5 * i - 0.6, "reward/proxy": i, "reward/gold": i * (5 - i)}
        for i in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def a_pipeline(run: Path) -> Config:
    """A finished pipeline as far as it is read; its paths are those of another directory."""
    config = Config(model=ModelConfig(path="runs/my/sft"), scoring=SCORING)
    a_stage(run, "sft", Config(), "sft")
    a_stage(run, "reward", Config(), "reward")
    a_stage(run, "ppo", config)
    a_stage(run, "grpo", replace(config, algo=replace(config.algo, kl=KLConfig(coef=0.1))))
    return config


def test_stages_are_found_where_the_pipeline_lies_now(tmp_path: Path) -> None:
    a_pipeline(tmp_path)
    stages = bench.find_stages(tmp_path)
    assert [stage.name for stage in stages] == ["grpo", "ppo"]
    assert stages[0].config.model.path == str(tmp_path / "sft")
    assert stages[0].config.scoring.rewards["learned"].path == str(tmp_path / "reward")
    assert stages[0].config.scoring.rewards["truth"].path == ""
    way = bench.path_of(stages[1])
    assert way.stage == "ppo" and way.gold == (4.0, 6.0, 6.0, 4.0, 0.0, -6.0) and way.proxy[-1] == 6.0
    assert way.kl[0] == pytest.approx(-0.1)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished stage with command train"):
        bench.find_stages(tmp_path)
    config = a_pipeline(tmp_path / "a")
    a_stage(tmp_path / "a", "zz", replace(config, model=ModelConfig(path="elsewhere")))
    with pytest.raises(ConfigError, match=r"grpo and zz differ in model\.path"):
        bench.find_stages(tmp_path / "a")
    a_stage(tmp_path / "b", "ppo", Config())
    with pytest.raises(ConfigError, match=r"ppo/config\.yaml: scoring\.gold is empty"):
        bench.find_stages(tmp_path / "b")
    a_stage(tmp_path / "c", "ppo", config, steps=0)
    with pytest.raises(DataError, match=r"has no kl/reference, reward/proxy, reward/gold; .*algo\.kl\.measure"):
        bench.path_of(bench.find_stages(tmp_path / "c")[0])
    with pytest.raises(ConfigError, match="no model is there"):
        bench.start_of(ModelConfig(path=str(tmp_path)))


def test_a_broken_summary_is_named(tmp_path: Path) -> None:
    a_pipeline(tmp_path)
    (tmp_path / "ppo" / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"ppo/summary\.json"):
        bench.find_stages(tmp_path)


def test_the_whole_but_for_the_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_pipeline(tmp_path)
    scores = [{"proxy": [0.0, 1.0, 2.0, 3.0], "gold": [1.0, 2.0, 3.0, 0.0]}] * 2
    monkeypatch.setattr(bench, "sampled", lambda *_: scores)
    out = tmp_path / "out.json"
    assert bench.main([str(tmp_path), "--samples", "4", "--prompts", "2", "--out", str(out)]) == 0
    assert (tmp_path / "overoptimization.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(out.read_text())
    assert [row["gold"] for row in found["best_of_n"]] == [1.5, pytest.approx(8 / 6), 0.0]
    assert [path["stage"] for path in found["paths"]] == ["grpo", "ppo"] and len(found["toy"]) == 3
    shown = capsys.readouterr().out
    assert "     4        0.64     3.000     0.000" in shown  # n, KL, proxy, gold
    assert "ppo           highest gold" in shown


@pytest.mark.engines
def test_the_engine_samples_and_the_scorer_scores(tmp_path: Path) -> None:
    from rlhf_dist.models.tiny import make_tiny

    sizes = TinyConfig(hidden_size=64, intermediate_size=64, layers=1, heads=2, kv_heads=1, max_positions=64)
    rewards = {"truth": RewardSpec(kind="gold", weight=2.0), "letters": RewardSpec(kind="regex", pattern="[a-z]*")}
    config = Config(
        output=str(tmp_path),
        model=ModelConfig(path=str(make_tiny(sizes, tmp_path))),
        data=DataConfig(task=TaskConfig(name="describe")),
        rollout=RolloutConfig(cpus=1, max_prompt_tokens=48, max_response_tokens=8, kv_cache_gib=0.1, max_concurrent=8),
        scoring=ScoringConfig(rewards=rewards, gold="truth"),
        cluster=ClusterConfig(device="cpu"),
    )
    scores = bench.sampled(bench.Finished("ppo", tmp_path, config), tmp_path, samples=4, prompts=2, seed=0)
    assert len(scores) == 2
    for one in scores:
        assert len(one["proxy"]) == len(one["gold"]) == 4
        assert all(p - 2 * g in (0.0, 1.0) and g <= 0 for p, g in zip(one["proxy"], one["gold"], strict=True))


def test_without_a_run_only_the_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "toy.json"
    assert bench.main(["--out", str(out)]) == 0
    assert set(json.loads(out.read_text())) == {"toy", "machine"}
    assert "3.1745" in capsys.readouterr().out  # log 64 - 63/64
    with pytest.raises(InputError, match="'1' is not a whole number of 2 or more"):
        bench.main(["--samples", "1"])
