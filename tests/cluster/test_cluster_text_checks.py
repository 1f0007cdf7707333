"""Texts against the model's template and tokenizer: rejected or warned of before anything starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Workplace, make_workplace

from rlhf_dist.cli.main import main
from rlhf_dist.cluster import build, preflight, trainer_ranks
from rlhf_dist.cluster.row_checks import check_texts, read_data
from rlhf_dist.cluster.sources import model_source
from rlhf_dist.cluster.supervised_build import sft
from rlhf_dist.config.load import load
from rlhf_dist.errors import DataError, ModelError
from rlhf_dist.planning.placement import Command

RAISES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    """A folder with a config and the model `model`; it is the current directory."""
    made = make_workplace(tmp_path / "here")
    shutil.copytree(tiny_model, made.folder / "model")
    monkeypatch.chdir(made.folder)
    return made


def looked(command: Command, row: Mapping[str, object], *overrides: str) -> list[str]:
    for name in ("data.jsonl", "held.jsonl"):
        Path(name).write_text(json.dumps(row) + "\n")
    words = [f"{key}=jsonl" for key in ("data.source", *(["preferences.source"] if command == "reward" else []))]
    section = "preferences" if command == "reward" else "data"
    words += [f"{section}.path=data.jsonl", f"{section}.eval_path=held.jsonl", "eval.prompts=1", "model.path=model"]
    config = load(Path("run.yaml"), [*words, *overrides])
    return check_texts(config, command, read_data(config, command))


def test_every_command_looks_at_its_texts(place: Workplace) -> None:
    end = r"2 of 2 responses hold an end token (<|end|>) before their end"
    assert looked("sft", {"prompt": "a", "response": "b<|end|>"}) == []
    (found,) = looked("sft", {"prompt": "a", "response": "b<|end|>c"})
    assert found.startswith(end) and "The first is at data.jsonl:1" in found
    (found,) = looked("reward", {"prompt": "a", "chosen": "b<|end|>c", "rejected": "d"}, "preferences.form=pair")
    assert found.startswith("2 of 4 responses hold an end token")
    (found,) = looked("train", {"prompt": "<|user|>a<|end|><|assistant|>", "answer": "b"})
    assert found.startswith("2 of 2 prompts hold special tokens that the chat template writes itself")
    assert looked("train", {"prompt": "<|user|>a<|end|><|assistant|>", "answer": "b"}, "data.chat=false") == []
    pattern = "scoring.rewards={form: {kind: regex, pattern: '<\\|user\\|>.*'}}"
    (found,) = looked("eval", {"prompt": "a", "answer": "b"}, pattern)
    assert found.endswith("set scoring.rewards.form.keep_special_tokens=true")


@pytest.mark.parametrize("command", ["train", "eval", "sft"])
def test_a_conversation_that_the_template_rejects_is_named(place: Workplace, command: Command) -> None:
    template = Path("model/chat_template.jinja")
    template.write_text(RAISES + template.read_text())
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    with pytest.raises(DataError, match=r"\.jsonl:1: .*roles system, user: no system turns; change the row"):
        looked(command, {"messages": turns, "answer": "b", "response": "b"})


@pytest.mark.parametrize("command", ["train", "sft", "reward"])
def test_a_template_that_cannot_be_used_ends_every_command_before_its_start(place: Workplace, command: Command) -> None:
    config = load(Path("run.yaml"), ["model.path=model", "data.system=Be kind.", "preferences.max_tokens=64"])
    model_source(config, None, command)
    template = Path("model/chat_template.jinja")
    before = template.read_text()
    template.write_text(RAISES + before)
    with pytest.raises(ModelError, match=r"no system turns\. .* data\.system"):
        model_source(config, None, command)
    template.write_text(before.replace("{% if add_generation_prompt %}", "{% if false %}"))
    with pytest.raises(ModelError, match="ignores add_generation_prompt"):
        model_source(config, None, command)


def test_an_engine_over_more_processes_than_heads_is_bad_input(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "run.yaml", "model.path=model", "rollout.tensor_parallel=3", "rollout.workers=1"]
    assert main([*words, "rollout.cpus=2"]) == 2
    assert "is 3, but a rollout worker has 2 CPU threads" in capsys.readouterr().err
    config = load(Path("run.yaml"), words[2:])
    for command in ("train", "eval"):
        with pytest.raises(ModelError, match=r"rollout\.tensor_parallel is 3, .* 2 attention heads .* one of 1, 2$"):
            model_source(config, None, command)
    model_source(config, None, "sft")
    config = load(Path("run.yaml"), ["model.path=model", "learner.ranks=3", "learner.sequence_parallel=3"])
    with pytest.raises(ModelError, match=r"learner\.sequence_parallel is 3, .* one of 1, 2$"):
        model_source(config, None, "sft")
    model_source(config, None, "eval")


def test_a_bad_template_is_bad_input(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    template = Path("model/chat_template.jinja")
    Path("model/additional_chat_templates").mkdir()
    template.rename("model/additional_chat_templates/chat.jinja")
    assert main(["train", "run.yaml", "model.path=model"]) == 2
    assert "has the chat templates chat and none named default; save the one to use" in capsys.readouterr().err
    assert not place.output.exists() or not list(place.output.glob("run*"))


def test_warnings_of_the_look_are_in_the_events_and_a_resume_looks_at_no_text(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened(Exception):
        pass

    def no_ray(*_: object) -> None:
        raise Opened

    config = load(Path("run.yaml"), ["model.path=model", "telemetry.wandb=off"])
    monkeypatch.setattr(preflight, "check_texts", lambda *_: ["one of a kind"])
    assert preflight.check_before_start(config, "sft") == ["one of a kind"]
    assert preflight.check_before_start(replace(config, name="other"), "sft", resume=True) == []
    for module in (build, trainer_ranks):
        monkeypatch.setattr(module, "ray_session", no_ray)
    for name, command in (("sft", sft), ("train", build.train)):
        with pytest.raises(Opened):
            command(replace(config, name=name), resume=False)
        assert "one of a kind" in (place.output / name / "events.jsonl").read_text()
