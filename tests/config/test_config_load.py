"""Loading: layers, overrides, and one clear message for each wrong input."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from rlhf_dist.config import load as loading
from rlhf_dist.config.load import MAX_WHOLE, from_yaml, load, to_yaml
from rlhf_dist.config.schema import Config, RewardSpec, RolloutConfig, ScoringConfig
from rlhf_dist.errors import ConfigError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.yaml", "# nothing\n"), []) == Config()


def test_values_of_every_type_arrive(tmp_path: Path) -> None:
    text = """
    name: a/b
    rollout: {temperature: 1, stop: [no, "x"], enforce_eager: false}
    learner: {optimizer: {lr: 1e-3}}
    telemetry: {wandb: off}
    """
    config = load(write(tmp_path / "a.yaml", text), [])
    assert config.name == "a/b"
    assert config.rollout == RolloutConfig(temperature=1.0, stop=["no", "x"], enforce_eager=False)
    assert isinstance(config.rollout.temperature, float)
    assert config.learner.optimizer.lr == 1e-3
    assert config.telemetry.wandb == "off"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "c"  # pyright: ignore[reportAttributeAccessIssue]


def test_includes_are_relative_to_the_file_and_later_wins(tmp_path: Path) -> None:
    write(tmp_path / "parts/deep.yaml", "seed: 1\nloop: {steps: 1, prompts_per_step: 1}\nalgo: {group_size: 3}")
    write(tmp_path / "parts/one.yaml", "include: [deep.yaml]\nloop: {steps: 2}")
    write(tmp_path / "two.yaml", "loop: {prompts_per_step: 5}")
    main = write(tmp_path / "main.yaml", "include: [parts/one.yaml, two.yaml]\nseed: 9")
    config = load(main, [])
    assert (config.seed, config.loop.steps, config.loop.prompts_per_step, config.algo.group_size) == (9, 2, 5, 3)


def test_include_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "include: [b.yaml]")
    write(tmp_path / "b.yaml", "include: [a.yaml]")
    message = refused(tmp_path / "a.yaml")
    assert "circle" in message and "a.yaml" in message and "b.yaml" in message


def test_same_file_twice_without_a_circle_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 4")
    write(tmp_path / "b.yaml", "include: [base.yaml]")
    assert load(write(tmp_path / "a.yaml", "include: [base.yaml, b.yaml]"), []).seed == 4


@pytest.mark.parametrize("text", ["include: base.yaml", "include: [1]", "include: {a: 1}"])
def test_include_must_be_a_list_of_names(tmp_path: Path, text: str) -> None:
    assert "must be a list of file names" in refused(write(tmp_path / "a.yaml", text))


def test_missing_include_names_the_including_file(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "a.yaml", "include: [nope.yaml]"))
    assert "nope.yaml (included by" in message and "a.yaml" in message


def test_a_file_replaces_the_default_rewards(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "scoring: {rewards: {mine: {kind: number}}}")
    assert load(path, []).scoring.rewards == {"mine": RewardSpec(kind="number")}
    changed = load(path, ["scoring.rewards.mine.weight=2"])
    assert changed.scoring.rewards == {"mine": RewardSpec(kind="number", weight=2.0)}


def test_overrides_modify_and_add_rewards(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "")
    overrides = ["scoring.rewards.exact.weight=0.5", "scoring.rewards.form={kind: regex}"]
    pattern = "scoring.rewards.form.pattern=<a>: {b=$"
    assert load(path, [*overrides, pattern]).scoring.rewards == {
        "exact": RewardSpec(weight=0.5),
        "form": RewardSpec(kind="regex", pattern="<a>: {b=$"),
    }


def test_text_overrides_are_taken_as_typed(tmp_path: Path) -> None:
    config = load(
        write(tmp_path / "a.yaml", ""), ["name=3", "data.answer_key=", 'data.system="a b"', "rollout.stop=[a,b]"]
    )
    assert (config.name, config.data.answer_key, config.data.system) == ("3", "", "a b")
    assert config.rollout.stop == ["a", "b"]


def test_later_override_wins(tmp_path: Path) -> None:
    assert load(write(tmp_path / "a.yaml", "seed: 1"), ["seed=2", "seed=3"]).seed == 3


def test_interpolation_is_resolved_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_SEED", "17")
    path = write(tmp_path / "a.yaml", "name: run-${seed}\nseed: ${oc.env:RUN_SEED}")
    assert load(path, []).name == "run-17"
    assert "`seed`" in refused(write(tmp_path / "b.yaml", "seed: ${output}"))
    assert "nope" in refused(write(tmp_path / "c.yaml", "name: ${nope}"))
    assert "`name`" in refused(write(tmp_path / "d.yaml", "name: ${name}"))
    assert "`loop` is the text" in refused(write(tmp_path / "e.yaml", "loop: ${sft}"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lopp: {steps: 1}", ["a.yaml", "unknown key `lopp`", "did you mean `loop`?"]),
        ("loop: {step: 1}", ["unknown key `loop.step`", "did you mean `loop.steps`?"]),
        ("lr: 1", ["unknown key `lr`", "`learner.optimizer.lr`"]),
        ("zzz: 1", ["unknown key `zzz`", "the sections are"]),
        ("loop: {zzz: 1}", ["unknown key `loop.zzz`", "`loop` has steps"]),
        ("3: 1", ["unknown key `3`"]),
        ("loop: {steps: ten}", ["`loop.steps` is the text 'ten'", "expected a whole number"]),
        ("loop: {steps: 1.5}", ["`loop.steps` is 1.5", "expected a whole number"]),
        ("loop: {steps: true}", ["`loop.steps` is true", "expected a whole number"]),
        ("loop: {steps: }", ["`loop.steps` has no value"]),
        ("loop: {steps: '???'}", ["`loop.steps` has no value"]),
        ("loop:", ["`loop` has no value"]),
        ("loop: 3", ["`loop` is 3", "expected a section"]),
        ("loop: [1]", ["`loop` is [1]", "expected a section"]),
        ("name: 3", ["`name` is 3", "expected text", "quotes"]),
        ("learner: {optimizer: {lr: fast}}", ["`learner.optimizer.lr` is the text 'fast'", "expected a number"]),
        ("cluster: {colocate: yes}", ["`cluster.colocate` is the text 'yes'", "true or false"]),
        ("rollout: {stop: abc}", ["`rollout.stop` is the text 'abc'", "expected a list"]),
        ("rollout: {stop: [a, 3]}", ["`rollout.stop[1]` is 3", "expected text"]),
        ("model: {dtype: float16}", ["`model.dtype` is the text 'float16'", "float32, bfloat16"]),
        ("scoring: {rewards: {a: {kind: best}}}", ["`scoring.rewards.a.kind`", "exact, number, regex, function"]),
        ("scoring: {rewards: {a: {kid: exact}}}", ["unknown key `scoring.rewards.a.kid`", "`scoring.rewards.a.kind`"]),
        ("scoring: {rewards: {a: {weight: x}}}", ["`scoring.rewards.a.weight`", "expected a number"]),
        ("scoring: {rewards: {a: 1}}", ["`scoring.rewards.a` is 1"]),
        ("scoring: {rewards: [exact]}", ["`scoring.rewards` is ['exact']", "mapping of names"]),
        ("scoring: {rewards: {1: {}}}", ["`scoring.rewards` has the name 1"]),
        ("seed: 1\nseed: 2", ["a.yaml:2:", "`seed` comes twice"]),
        ("seed: 1\nloop: {steps: 1\nname: x", ["a.yaml:3:", "not valid YAML"]),
        ("- 1", ["a.yaml", "a config is a mapping"]),
        ("hello", ["a config is a mapping"]),
    ],
)
def test_bad_files(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refused(write(tmp_path / "a.yaml", text))
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("loop.steps", ["`loop.steps`", "form key=value"]),
        ("=3", ["form key=value"]),
        ("loop..steps=3", ["form key=value"]),
        ("rollout.stop[0]=a", ["form key=value"]),
        ("loop.steps=", ["`loop.steps` has no value"]),
        ("loop.steps=[1", ["not valid YAML"]),
        ("loop.stepss=1", ["override `loop.stepss=1`", "did you mean `loop.steps`?"]),
        ("loop.steps.more=1", ["`loop.steps` is {'more': 1}", "whole number"]),
        ("telemetry.wandb=no", ["the text 'no'", "auto, online, offline, off"]),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, parts: list[str]) -> None:
    message = refused(write(tmp_path / "a.yaml", ""), override)
    assert all(part in message for part in parts), message


def test_all_problems_at_once(tmp_path: Path) -> None:
    message = refused(write(tmp_path / "a.yaml", "seed: x\nlopp: 1"), "loop.steps=no")
    assert [part in message for part in ("`seed`", "`lopp`", "override `loop.steps=no`")] == [True] * 3


def test_missing_file_suggests_one_that_is_there(tmp_path: Path) -> None:
    write(tmp_path / "local.yaml", "")
    assert "did you mean" in refused(tmp_path / "locl.yaml") and "local.yaml" in refused(tmp_path / "locl.yaml")
    assert "is a directory" in refused(tmp_path)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "cannot be read" in refused(path)


TEXT = st.text(
    st.characters(exclude_categories=("Cs", "Cc", "Cn", "Co"), exclude_characters="\u2028\u2029\ufeff"), max_size=20
)
TRICKY = st.sampled_from(
    ["off", "1e-3", "010", "null", "~", "", "${a}", "\\${a}", "\\\\${b}", "a\\", "<<", "=", "1:30", "- a"]
)


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("configs/**/*.yaml")), ids=lambda path: path.stem
)
def test_a_config_without_references_is_what_omegaconf_would_make_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Type by type: a whole number where a float is declared, too."""
    words = ["loop.steps=7", "rollout.stop=[a, b]", "algo.gamma=1"]
    ours = load(path, words)
    monkeypatch.setattr(loading, "_refers", lambda _: True)
    theirs = load(path, words)
    assert ours == theirs and repr(ours) == repr(theirs)


@settings(max_examples=30)
@given(
    name=TEXT | TRICKY,
    stop=st.lists(TEXT | TRICKY, max_size=3),
    lr=st.floats(allow_nan=False),
    seed=st.integers(-MAX_WHOLE, MAX_WHOLE),
)
def test_yaml_round_trip(name: str, stop: list[str], lr: float, seed: int) -> None:
    optimizer = dataclasses.replace(Config().learner.optimizer, lr=lr)
    config = dataclasses.replace(
        Config(),
        name=name,
        seed=seed,
        rollout=RolloutConfig(stop=stop),
        learner=dataclasses.replace(Config().learner, optimizer=optimizer),
        scoring=ScoringConfig(rewards={"form": RewardSpec(kind="regex", pattern=name)}),
    )
    assert from_yaml(to_yaml(config)) == config
