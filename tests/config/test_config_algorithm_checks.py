"""What single methods ask of a config: their files, which keys go together, and for which command."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config_checks import ROOT, config

from rlhf_dist.config import effects
from rlhf_dist.config.algorithm_checks import LAG
from rlhf_dist.config.checks import problems
from rlhf_dist.config.keys import given, told
from rlhf_dist.config.load import load
from rlhf_dist.config.methods import METHODS, Method
from rlhf_dist.config.schema import AlgoConfig


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
        *([f"algo.name={name}", "algo.ratio_to=behaviour"] for name in ("ppo", "nlpo", "reinforce_pp", "cispo")),
        ["algo.name=gspo", "algo.clip_low=3e-4", "algo.clip_high=4e-4", "algo.ratio_to=behaviour", "learner.epochs=2"],
    ],
)
def test_what_goes_together_passes(tmp_path: Path, overrides: list[str]) -> None:
    assert problems(config(tmp_path, *overrides), "train") == []


NO_RATIO_HERE = ["a2c", "reinforce", "remax", "rloo", "opo"]
DECOUPLED = ["algo.name=decoupled_ppo", "algo.correction.level=token"]


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        *(
            ([f"algo.name={name}"], [f"algo.ratio_to is behaviour and has no effect with algo.name {name}", "no ratio"])
            for name in NO_RATIO_HERE
        ),
        (DECOUPLED, ["algo.ratio_to is behaviour with algo.name decoupled_ppo", "algo.correction", "choose ppo"]),
        (
            ["algo.correction.level=sequence"],
            ["algo.ratio_to is behaviour with algo.correction.level sequence", "count twice", "to proximal", "to off"],
        ),
    ],
)
def test_a_ratio_to_the_sampler_is_refused_where_it_cannot_be(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    (found,) = problems(config(tmp_path, *overrides, "algo.ratio_to=behaviour"), "train")
    assert all(part in found for part in parts), found


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ([], ["loop.max_policy_lag is 2", "algo.ratio_to proximal", "algo.correction.level off", "to behaviour"]),
        (["algo.ratio_to=behaviour"], []),
        (["algo.correction.level=token"], []),
        (DECOUPLED, []),
        *(
            ([f"algo.name={name}"], ["loop.max_policy_lag is 2", "algo.correction.level off", f"algo.name {name}"])
            for name in NO_RATIO_HERE
        ),
        *(([f"algo.name={name}", "algo.correction.level=geometric"], []) for name in NO_RATIO_HERE),
        (["loop.max_policy_lag=0"], []),
    ],
)
def test_stale_rows_need_a_ratio_to_the_sampler_or_a_correction(
    tmp_path: Path, overrides: list[str], parts: list[str]
) -> None:
    found = list(told(LAG, config(tmp_path, "loop.max_policy_lag=2", *overrides)))
    assert len(found) == bool(parts)
    assert all(part in found[0] for part in parts), found


@pytest.mark.parametrize(
    ("overrides", "refused"),
    [
        (["algo.name=ppo", "critic.warmup_steps=2"], True),
        (["algo.name=ppo"], False),
        (["algo.name=ppo", "critic.start=shared"], False),
        (["learner.epochs=2", "algo.kl_stop=0.1"], False),
    ],
)
def test_a_witness_needs_a_policy_that_learns_in_each_step(tmp_path: Path, overrides: list[str], refused: bool) -> None:
    witnessed = config(tmp_path, *overrides, "loop.witness=true")
    found = problems(witnessed, "train")
    assert len(found) == refused
    if refused:
        assert found[0].startswith("loop.witness is true with critic.warmup_steps 2; ") and "to 0, or" in found[0]
    assert problems(witnessed, "sft") == problems(config(tmp_path, *overrides), "sft"), "sft does not read it"


def test_what_stale_rows_need_is_checked(tmp_path: Path) -> None:
    found = problems(config(tmp_path, "loop.max_policy_lag=2"), "train")
    assert any("loop.max_policy_lag is 2 with algo.ratio_to proximal" in text for text in found)


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (
            ["algo.ratio_to=behaviour", "rollout.top_p=0.9"],
            "rollout.top_p is 0.9 and rollout.top_k 0 with algo.ratio_to",
        ),
        (
            ["algo.correction.level=token", "rollout.top_k=5"],
            "rollout.top_k 5 with algo.ratio_to proximal and algo.corr",
        ),
    ],
)
def test_a_cut_distribution_has_no_ratio_to_the_learner(tmp_path: Path, overrides: list[str], found: str) -> None:
    (problem,) = problems(config(tmp_path, *overrides), "train")
    assert found in problem and "set top_p to 1 and top_k to 0" in problem


def test_rules_of_algorithms_are_for_train_alone(tmp_path: Path) -> None:
    bad = config(tmp_path, "critic.coef=0.5", "algo.kl.controller=adaptive", "reference.path=model")
    assert len(problems(bad, "train")) == 3
    assert problems(bad, "sft") == problems(bad, "eval") == []


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (Method("mine", "group", ()), ["recipe is 'mine'; it must be MODULE:FUNCTION"]),
        (Method("a:b", "groups", ()), ["baseline is 'groups'; it must be one of critic, group"]),  # pyright: ignore[reportArgumentType]
        (Method("a:b", "group", (), ratio=False), ["ratio is False; it must be a tuple of proximal, behaviour"]),  # pyright: ignore[reportArgumentType]
        (Method("a:b", "group", "aggregation"), ["keys is 'aggregation'; it must be a tuple"]),  # pyright: ignore[reportArgumentType]
        (Method("a:b", "group", ("clip_hi",)), ["keys is ('clip_hi',)"]),
        (Method("a:b", "group", ("group_size",)), ["keys has 'group_size', which every method has"]),
    ],
)
def test_a_row_that_makes_no_sense_is_told(
    tmp_path: Path, row: Method, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "own", row)
    (found,) = problems(config(tmp_path, "algo.name=own"), "train")
    assert found.startswith("the row of own in rlhf_dist/config/methods.py: ")
    assert all(part in found for part in parts), found


def test_a_key_that_only_some_methods_have_is_in_a_row() -> None:
    declared = {key.name for key in given(AlgoConfig()) if effects.of_method in key.rules}
    assert declared == {key for method in METHODS.values() for key in method.keys}


def test_a_row_can_refuse_what_it_does_not_work_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = {"algo.group_size is {c.algo.group_size} with algo.name own": lambda c: c.algo.group_size > 4}
    monkeypatch.setitem(METHODS, "own", Method("a:b", "group", (), refuses=refuses))
    assert problems(config(tmp_path, "algo.name=own"), "train") == ["algo.group_size is 8 with algo.name own"]
    assert problems(config(tmp_path, "algo.name=own", "algo.group_size=4"), "train") == []


def test_a_path_is_shown_as_it_was_given(tmp_path: Path) -> None:
    (found,) = problems(config(tmp_path, "critic.start=Runs/RM"), "train")
    assert found.startswith("critic.start is Runs/RM and has no effect with algo.name grpo, which has no critic; ")


def test_an_unknown_method_hides_nothing_that_does_not_depend_on_it(tmp_path: Path) -> None:
    first, second = problems(config(tmp_path, "algo.name=rlo", "algo.kl.target=3", "algo.gamma=0.5"), "train")
    assert {first.split()[0], second.split()[0]} == {"algo.name", "algo.kl.target"}


@pytest.mark.parametrize(("typed", "meant"), [("reinforce++", "reinforce_pp"), ("PPO", "ppo"), ("dr-grpo", "dr_grpo")])
def test_a_method_is_known_by_other_spellings(tmp_path: Path, typed: str, meant: str) -> None:
    (found,) = problems(config(tmp_path, f"algo.name={typed}"), "train")
    assert found.endswith(f"did you mean {meant}?")


def test_dapo_without_any_of_its_keys_is_grpo(tmp_path: Path) -> None:
    (found,) = problems(config(tmp_path, "algo.name=dapo"), "train")
    assert "that is grpo; include configs/algo/dapo.yaml" in found
    assert problems(config(tmp_path, "algo.name=dapo", "algo.clip_high=0.28"), "train") == []
