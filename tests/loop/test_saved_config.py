"""The config that a run keeps: runs of a version that had fewer keys are resumed, other changes are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_dist.config.load import from_yaml, to_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.loop.saved_config import config_changes, key_changes, require_same_config
from rlhf_dist.loop.stages import Basis, differences

NOW = to_yaml(from_yaml("scoring: {rewards: {judge: {kind: exact, weight: 2.0}}}"))


def without(text: str, key: str) -> str:
    """The config as a version wrote it that did not have the key."""
    fewer = re.sub(rf"^ *{key}: .*\n", "", text, flags=re.MULTILINE)
    assert fewer != text, f"{key} is not in the config"
    return fewer


@pytest.mark.parametrize("key", ["keep_special_tokens", "seed", "clip_high"])
def test_a_key_that_the_earlier_version_did_not_have_is_no_change_at_its_default(tmp_path: Path, key: str) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(without(NOW, key))
    assert config_changes(saved, NOW) == []


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (
            "scoring: {rewards: {judge: {weight: 2.0, keep_special_tokens: true}}}",
            "judge.keep_special_tokens from False",
        ),
        ("scoring: {rewards: {judge: {weight: 2.0}, other: {}}}", r"other.kind from \(absent\) to exact"),
        ("scoring: {rewards: {judge: {weight: 3.0}}}", "judge.weight from 2.0 to 3.0"),
    ],
)
def test_what_is_not_at_its_default_or_a_whole_new_section_is_a_change(tmp_path: Path, new: str, told: str) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(without(NOW, "keep_special_tokens"))
    assert any(re.search(told, change) for change in config_changes(saved, to_yaml(from_yaml(new))))


def test_changes_are_found_beside_keys_that_no_version_has() -> None:
    assert key_changes({"seed": 1, "loop": 2, "loop.steps": 3}, {"seed": 2, "name": "run"}).keys() == {
        *("seed", "name", "loop", "loop.steps")
    }


def test_a_finished_stage_of_an_earlier_version_is_not_run_anew_for_a_key_that_it_did_not_have() -> None:
    def basis(**loop: int) -> Basis:
        return Basis("train", {f"loop.{key}": value for key, value in loop.items()}, {})

    default = Config().loop.prompts_per_step
    assert differences(basis(steps=5), basis(steps=5, prompts_per_step=default)) == []
    assert len(differences(basis(steps=5), basis(steps=5, prompts_per_step=default + 1))) == 1


def test_a_truncated_config_and_one_of_another_run_are_told_apart_in_a_line(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    saved.write_text(NOW[: NOW.index("data:")])
    with pytest.raises(
        DataError, match=r"config\.yaml: \d+ keys of a run's config are missing, as \S+, so it is trunc"
    ):
        require_same_config(saved, NOW)
    saved.write_text(NOW)
    other = re.sub(r": 1\.0$", ": 0.5", NOW, flags=re.MULTILINE)
    with pytest.raises(
        ConfigError, match=r"a resume cannot change (\S+ from 1\.0 to 0\.5; ){8}and \d+ more keys\. Give"
    ):
        require_same_config(saved, other)
