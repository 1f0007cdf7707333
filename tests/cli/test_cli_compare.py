"""`rlhf-dist compare`: what is rejected before an engine starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Workplace, make_workplace

from rlhf_dist.cli.main import main
from rlhf_dist.config.load import from_yaml


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """Models a and b, a config, and a run's directory that has no model."""
    place = make_workplace(tmp_path)
    monkeypatch.chdir(place.folder)
    for name in ("a", "b"):
        shutil.copytree(tiny_model, name)
    (place.output / "taken").mkdir(parents=True)
    (place.output / "taken" / "config.yaml").touch()
    return place


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["compare needs a config file first", "compare CONFIG.yaml A B [C ...]"]),
        (["runs/taken", "a", "b"], ["compare needs a config file first", "that of this run is runs/taken/config.yaml"]),
        (["run.yaml"], ["compare needs two policies or more, and there is none"]),
        (["run.yaml", "a", "seed=2"], ["compare needs two policies or more, and a is one"]),
        (["run.yaml", "a", "b", "model.path=a"], ["from the command line: leave out model.path=a"]),
        (["run.yaml", "a", "b", "compare.judge=tru"], ["compare.judge is tru; it must be the name of one of"]),
        (["run.yaml", "a", "b", "compare.tie_margin=-1"], ["compare.tie_margin is -1", "0 or more"]),
        (["run.yaml", "a", "b", "rollout.temperature=0"], ["rollout.temperature is 0 with eval.samples 2"]),
        (["run.yaml", "a", "b", "name=taken"], ["runs/taken: exists", "give another name="]),
        (["run.yaml", "a", "b", "a/"], ["policy a/: is the same model as a"]),
        (["run.yaml", "a", "a"], ["policy a: is given twice"]),
        (["run.yaml", "a", "./c"], ["policy = './c': there is no such directory"]),
        (
            ["run.yaml", "a", "b", "rollout.max_prompt_tokens=12"],
            ["12 held-out prompts have more tokens than rollout.max_prompt_tokens, 12, with the tokenizer of a"],
        ),
        (["run.yaml", "a", "b", "rollout.max_response_tokens=300"], ["rollout.max_response_tokens", "128"]),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_made(
    place: Workplace, words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(place.output.rglob("*"))
    assert main(["compare", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and all(part in said.err for part in parts), said.err
    assert sorted(place.output.rglob("*")) == before


def test_a_dry_run_names_the_policies_and_starts_nothing(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "run.yaml", "a", "b", "name=new", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert from_yaml(said).name == "new"
    assert "# compares a, b\n" in said and said.endswith("new\n") and not (place.output / "new").exists()
