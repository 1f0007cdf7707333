"""Config files and paths that are not what they should be: one message each, and no traceback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlhf_dist.cli.main import main
from rlhf_dist.config.checks import problems
from rlhf_dist.config.load import as_written, from_yaml, load, to_yaml
from rlhf_dist.config.paths import is_missing, lookup_problem, named_paths
from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.errors import ConfigError

LAUGHS = "\n".join(
    ["rollout:", "  stop: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"  l{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
)
FILES = {
    "nested lists": ("rollout: {stop: " + "[" * 3000 + "]" * 3000 + "}", ":1: not valid YAML: nested more than 50"),
    "nested mappings": ("a: " + "{a: " * 3000 + "1" + "}" * 3000, "nested more than 50 levels deep"),
    "nested items": ("- " * 3000 + "1", "nested more than 50 levels deep"),
    "never closed": ("a: " + "[" * 100_000, "nested more than 50 levels deep"),
    "aliases of aliases": (LAUGHS, r"a\.yaml:6: not valid YAML: more than 100000 values"),
    "an alias in itself": ("rollout: {stop: &a [*a]}", "an alias stands inside what it refers to"),
    "an alias of nothing": ("rollout: {stop: *a}", "found undefined alias"),
    "a tab": ("loop:\n\tsteps: 1", r"a\.yaml:2: not valid YAML: .*; indent with spaces"),
    "a key twice": ("loop:\n  steps: 1\n  steps: 2", r"a\.yaml:3: not valid YAML: the key `steps` comes twice"),
    "a key twice in a list": ("rollout: {stop: [{a: 1, a: 2}]}", "the key `a` comes twice"),
    "two documents": ("seed: 1\n---\nseed: 2", "it holds several documents"),
    "a tag of Python": ("name: !!python/object/apply:os.getcwd []", "a config has no tags"),
    "a tag of one's own": ("name: !mine x", "a config has no tags"),
    "a tag that does not fit": ("name: !!timestamp x", "a tag .* with a value that is not of its kind"),
    "a bool that is none": ("name: !!bool x", "a tag .* with a value that is not of its kind"),
    "a list as a key": ("? [a, b]\n: 1", "unhashable key"),
    "a merge of a number": ("loop: {<<: 3}", "expected a mapping"),
    "a line end of YAML 1.1": (
        "seed: 1\nname: 'a\x85b'",
        r"a\.yaml:2: not valid YAML: .* U\+0085, .*write it as \"\\u0085",
    ),
    "a control character": ("name: a\x00b", "special characters are not allowed"),
    "a huge whole number": (f"seed: {'9' * 5000}", r"a\.yaml:1: not valid YAML: a whole number of 5,000 digits; put"),
    "a whole number beyond floats": (
        f"loop: {{steps: 1{'0' * 400}}}",
        r"`loop.steps` is 1000.*; expected a whole number of",
    ),
    "a number beyond floats": (
        f"learner: {{optimizer: {{lr: 1{'0' * 400}}}}}",
        "`learner.optimizer.lr` is 1.*a number of at",
    ),
    "half a character": (r'data: {system: "a\ud800"}', "`data.system` holds half a surrogate pair, .* character 1"),
    "a list of texts with one": (r'rollout: {stop: ["\udc00"]}', r"`rollout.stop\[0\]` holds half"),
    "a lone reference": ("data: {system: 'costs ${'}", r"a\.yaml: `data.system` is .*write \\\$\{ for the text"),
    "a pattern": (
        "scoring: {rewards: {form: {kind: regex, pattern: '${x y}'}}}",
        r"`scoring.rewards.form.pattern` is the text '\$\{x y\}', .*write \\\$\{ for the text",
    ),
    "references without end": (
        "name: '" + "${" * 3000 + "a" + "}" * 3000 + "'",
        "has more than 50 references .*; write",
    ),
    "JSON lines": ('{"prompt": "a"}\n{"prompt": "b"}', "not valid YAML"),
}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_config(tmp_path: Path, kind: str) -> None:
    text, words = FILES[kind]
    with pytest.raises(ConfigError, match=words) as caught:
        load(write(tmp_path / "a.yaml", text))
    assert str(caught.value).startswith(f"{tmp_path}/a.yaml") and len(str(caught.value)) < 600


def test_a_file_of_another_encoding(tmp_path: Path) -> None:
    for text in ("name: é".encode("latin-1"), "name: a".encode("utf-16")):
        with pytest.raises(ConfigError, match=r"a\.yaml cannot be read as UTF-8 .*; save it as UTF-8"):
            load(write(tmp_path / "a.yaml", text))
    assert load(write(tmp_path / "a.yaml", "name: é\n".encode("utf-8-sig"))).name == "é"


def test_a_data_file_in_the_place_of_a_config(tmp_path: Path) -> None:
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(9 << 20)
    with pytest.raises(ConfigError, match="has 9 MiB; a config has at most 8"):
        load(tmp_path / "a.yaml")


def test_a_file_that_would_be_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match=r"pipe is a pipe; .*write it to a file"):
        load(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a device"):
        load(write(tmp_path / "a.yaml", "include: [/dev/zero]"))


def test_aliases_and_merged_keys_are_fine(tmp_path: Path) -> None:
    text = """
    sft: {optimizer: &base {lr: 0.5, warmup_steps: 3}}
    learner: {optimizer: &other {<<: *base, lr: 0.25}}
    critic: {optimizer: {<<: *other, lr: 0.125}}
    reward: {optimizer: *other}
    """
    config = load(write(tmp_path / "a.yaml", text))
    found = [section.optimizer for section in (config.sft, config.learner, config.critic, config.reward)]
    assert [(one.lr, one.warmup_steps) for one in found] == [(0.5, 3), (0.25, 3), (0.125, 3), (0.25, 3)]


def test_the_way_out_for_a_text_with_a_dollar_and_a_brace(tmp_path: Path) -> None:
    texts = ["${", "a ${ b", "${a b}", "${output}", "costs ${5} or ${x"]
    escaped = ", ".join("'" + text.replace("${", r"\${") + "'" for text in texts)
    config = load(write(tmp_path / "a.yaml", f"rollout: {{stop: [{escaped}]}}"), [r"data.system=a \${ b"])
    assert config.rollout.stop == texts and config.data.system == "a ${ b"
    assert from_yaml(to_yaml(config)) == config


LONG = "a" * 300
LOOKED_UP = {"too long": LONG, "below one too long": f"{LONG}/x", "too long in all": "a/" * 3000, "NUL": "a\0b"}


@pytest.fixture
def loop(tmp_path: Path) -> str:
    """A link that leads to itself."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return str(tmp_path / "loop")


@pytest.mark.parametrize("kind", [*LOOKED_UP, "a loop of links"])
def test_paths_that_the_system_cannot_look_up(kind: str, loop: str, tmp_path: Path) -> None:
    path = LOOKED_UP.get(kind, loop)
    assert lookup_problem(path) and not is_missing(path)
    keys = ["data.path", "data.eval_path", "ptx.path", "model.path", "reference.path", "critic.start", "output"]
    keys += ["preferences.path", "preferences.eval_path", "scoring.rewards.exact.path"]
    file = write(tmp_path / "a.yaml", "")
    overrides = [f"{key}={path}" for key in keys]
    config = load(file, [*overrides, "data.source=jsonl", "preferences.source=jsonl", "ptx={coef: 1.0, source: jsonl}"])
    for command in ("train", "reward"):
        found = problems(config, command)
        for key in keys:
            of_key = [problem for problem in found if problem.startswith(f"{key} is ")]
            (one,) = [problem for problem in of_key if "cannot be looked up: " in problem]
            assert len(one) < 250 and not any("does not exist" in problem for problem in of_key)
    with pytest.raises(ConfigError, match="cannot be looked up: "):
        load(Path(path))
    if "\0" not in path:
        with pytest.raises(ConfigError, match=r"\(included by .*a\.yaml\) cannot be looked up: "):
            load(write(tmp_path / "a.yaml", f"include: ['{path}']"))


def test_a_home_is_put_where_a_path_begins_with_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell leaves `~` behind `=` as it is, and YAML knows none."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    keys = ["data.path", "data.eval_path", "ptx.path", "model.path", "reference.path", "critic.start", "output"]
    keys += ["preferences.path", "preferences.eval_path", "scoring.rewards.exact.path", "scoring.rewards.a.b.path"]
    file = write(tmp_path / "a.yaml", "scoring: {rewards: {exact: {path: ~/x}, a.b: {path: ~/x}}}\nmodel: {path: ~/x}")
    config = load(file, [f"{key}=~/x" for key in keys if "rewards" not in key and key != "model.path"])
    assert named_paths(config) == dict.fromkeys(keys, str(tmp_path / "home" / "x"))
    kept = as_written(file, ["output=~/runs"])
    assert kept.output == "~/runs" and load(file, ["data.system=~/x"]).data.system == "~/x"
    nobody = load(file, ["output=~no-such-user/x"])
    found = [problem for problem in problems(nobody, "train") if problem.startswith("output is ")]
    assert found == [
        "output is '~no-such-user/x', and there is no such home on this machine; give the path without the ~"
    ]


def test_what_is_not_there_has_no_problem(tmp_path: Path) -> None:
    for path in (tmp_path / "no", write(tmp_path / "file", "") / "below"):
        assert is_missing(path) and lookup_problem(path) == ""
    assert not is_missing(tmp_path) and lookup_problem(tmp_path) == ""


def test_a_long_override_without_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "pipeline"):
        assert main([command, f"data.system={LONG}"]) == 2
        assert "needs a config file first" in capsys.readouterr().err


def test_overrides_that_are_too_deep(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "")
    for override in (".".join(["loop"] * 3000) + "=1", "rollout.stop=" + "[" * 3000 + "]" * 3000):
        with pytest.raises(ConfigError, match=r"form key=value|nested more than 50") as caught:
            load(file, [override])
        assert len(str(caught.value)) < 500


REWARDS = "scoring: {rewards: {mine: {kind: number}, form: {kind: regex, pattern: a}}}"
JUDGE = {"judge": RewardSpec(kind="model", path="rm")}


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", ["scoring.rewards={judge: {kind: model, path: rm}}"], JUDGE),
        ("", ["scoring={rewards: {judge: {kind: model, path: rm}}}"], JUDGE),
        (REWARDS, ["scoring.rewards={judge: {kind: model, path: rm}}"], JUDGE),
        (REWARDS, ["scoring.rewards={}"], {}),
        (REWARDS, ["scoring.rewards={}", "scoring.rewards.judge={kind: model, path: rm}"], JUDGE),
        (REWARDS, ["scoring.rewards={judge: {kind: model}}", "scoring.rewards.judge.path=rm"], JUDGE),
        (
            "scoring: {rewards: {mine: {kind: number}}}",
            ["scoring.rewards.mine.weight=2", "scoring.rewards.judge={kind: model, path: rm}"],
            {"mine": RewardSpec(kind="number", weight=2.0), **JUDGE},
        ),
        ("include: [rewards.yaml]\nscoring: {rewards: {judge: {kind: model, path: rm}}}", [], JUDGE),
        ("include: [rewards.yaml]\nscoring: {rewards: {}}", [], {}),
    ],
)
def test_named_things_are_replaced_by_whoever_gives_all_of_them(
    tmp_path: Path, text: str, overrides: list[str], expected: dict[str, RewardSpec]
) -> None:
    write(tmp_path / "rewards.yaml", REWARDS)
    assert load(write(tmp_path / "a.yaml", text), overrides).scoring.rewards == expected


def test_stages_follow_the_same_rule(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "pipeline: {stages: {sft: {command: sft}, grpo: {command: train}}}")
    assert list(load(file, ["pipeline.stages={only: {command: sft}}"]).pipeline.stages) == ["only"]
    assert list(load(file, ["pipeline.stages.more.command=sft"]).pipeline.stages) == ["sft", "grpo", "more"]
    assert load(file, ["pipeline.stages={}"]).pipeline == Config().pipeline


def test_a_cleared_mapping_is_told(tmp_path: Path) -> None:
    config = load(write(tmp_path / "a.yaml", ""), ["scoring.rewards={}"])
    assert any("scoring.rewards is empty" in problem for problem in problems(config, "train"))
