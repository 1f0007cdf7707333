"""What single methods ask of a config: their files, which keys go together, and for which command."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config_checks import ROOT, config

from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import load
from rlhf_dist.config.methods import METHODS


def test_every_method_has_its_file_and_every_file_its_method() -> None:
    files = {path.stem: path for path in (ROOT / "configs" / "algo").glob("*.yaml")}
    assert files.keys() == METHODS.keys()
    for name, path in files.items():
        assert load(path).algo.name == name
        assert problems(load(path), "train") == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["reverse.yaml", "gsm8k.yaml"])
def test_a_methods_file_goes_over_a_shipped_config(tmp_path: Path, method: str, name: str) -> None:
    configs = ROOT / "configs"
    (tmp_path / "mine.yaml").write_text(f"include: [{configs / name}, {configs / 'algo' / method}.yaml]\n")
    short = ["algo.shaping.overlong_buffer=4"] if method == "dapo" else []  # responses of at most 16 tokens
    found = problems(load(tmp_path / "mine.yaml", short), "train")
    assert [problem for problem in found if "data." not in problem and "model." not in problem] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo.name=ppo", "algo.group_size=1", "algo.gamma=0.9", "algo.advantage_clip=5", "critic.side_by_side=true"],
        ["algo.name=ppo", "critic.start=shared", "critic.coef=0.5", "critic.clip=0"],
        ["algo.name=a2c", "algo.lam=1", "critic.clip=0"],
        ["algo.name=reinforce", "algo.group_size=1", "algo.aggregation=sequence_mean"],
        ["algo.name=reinforce_pp", "algo.group_size=1", "algo.gamma=0.9", "algo.dual_clip=3", "learner.epochs=2"],
        ["algo.name=decoupled_ppo", "algo.correction.level=token", "algo.correction.high=5"],
        ["algo.name=cispo", "algo.clip_low=1", "algo.clip_high=4", "algo.correction.level=geometric"],
        ["algo.name=dapo", "algo.shaping.overlong_buffer=4", "algo.entropy_share=0.2", "algo.off_policy_limit=0.1"],
        ["algo.name=ppo", "critic.warmup_steps=99", "algo.kl_stop=0.1", "learner.epochs=2"],
        ["algo.kl.measure=true", "reference.update_every=5", "reference.ema=0.9", "reference.path=model"],
        ["algo.kl.controller=adaptive", "algo.kl.coef=0.1", "algo.kl.horizon=26"],
        ["algo.kl_stop=0.1", "learner.updates_per_batch=2"],
        ["rollout.top_p=0.9", "rollout.top_k=5"],
    ],
)
def test_what_goes_together_passes(tmp_path: Path, overrides: list[str]) -> None:
    assert problems(config(tmp_path, *overrides), "train") == []


def test_rules_of_algorithms_are_for_train_alone(tmp_path: Path) -> None:
    bad = config(tmp_path, "critic.coef=0.5", "algo.kl.controller=adaptive", "reference.path=model")
    assert len(problems(bad, "train")) == 3
    assert problems(bad, "sft") == problems(bad, "eval") == []
