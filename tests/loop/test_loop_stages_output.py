"""What a stage left and was changed by hand since: what is refused, and with which way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from test_loop_stages import CONFIG, HF, begin, finish, stage

from rlhf_dist.config.pipeline_checks import Stage
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.loop.run_directory import write_json, write_text
from rlhf_dist.loop.stages import basis_of, decide, write_finished
from rlhf_dist.models.checkpoints import sealed


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The config, in the current directory, below which everything is."""
    monkeypatch.chdir(tmp_path)
    Path("pipe.yaml").write_text(CONFIG)
    return Path("pipe.yaml")


def seal(stage: Stage) -> None:
    """Let the files of its checkpoint, as they are now, be those that it was written with."""
    folder = stage.path / "checkpoints" / "step-3"
    write_text(folder / "state.json", sealed(folder, {"step": 3}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda run: (run / "checkpoints/step-3/hf/model.safetensors").write_text("W"),
            "model.safetensors: was changed",
        ),
        (lambda run: (run / "checkpoints/step-3/hf/more.json").write_text(""), "more.json: was added"),
    ],
)
def test_an_output_changed_by_hand_is_refused_with_the_ways_out(
    file: Path, change: Callable[[Path], None], named: str
) -> None:
    sft = stage(file, "sft")
    finish(sft)
    change(sft.path)
    with pytest.raises(ConfigError) as caught:
        decide(sft, basis_of(sft, {}))
    message = str(caught.value)
    assert f"{named} after stage sft had finished" in message
    assert message.endswith(f"Put it back, or move {sft.path} away to rerun it")


@pytest.mark.parametrize(
    "name", [f"{HF}/config.json", f"{HF}/generation_config.json", "checkpoints/LATEST", "summary.json"]
)
def test_a_file_that_was_removed_is_to_be_put_back(file: Path, name: str) -> None:
    sft = stage(file, "sft")
    finish(sft)
    text = (sft.path / name).read_text()
    (sft.path / name).unlink()
    with pytest.raises(ConfigError) as caught:
        decide(sft, basis_of(sft, {}))
    assert str(caught.value) == (
        f"{sft.path / name}: was removed after stage sft had finished. Put it back, or move {sft.path} away to rerun it"
    )
    (sft.path / name).write_text(text)
    assert decide(sft, basis_of(sft, {})).kind == "skip"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_without_the_record_a_model_that_is_not_whole_is_not_accepted(file: Path, name: str) -> None:
    sft = stage(file, "sft")
    basis = basis_of(sft, {})
    finish(sft)
    (sft.path / "stage.json").unlink()
    lost = sft.path / HF / name
    text = lost.read_text()
    lost.unlink()
    with pytest.raises(DataError, match=rf"{lost}: is missing\. Restore the file from .* or move {sft.path} away"):
        decide(sft, basis)
    with pytest.raises(ConfigError, match=rf"{lost}: is not there, .* Put it back, or move {sft.path} away"):
        write_finished(sft, basis, 1.0)
    lost.write_text(text)
    assert decide(sft, basis).kind == "resume"
    write_finished(sft, basis, 1.0)
    assert decide(sft, basis).kind == "skip"


def test_a_record_of_a_model_that_was_not_whole_is_no_reason_to_refuse_the_whole_one(file: Path) -> None:
    sft = stage(file, "sft")
    finished = finish(sft)
    files = {name: value for name, value in finished.files.items() if name != "config.json"}
    write_json(sft.path / "stage.json", asdict(replace(finished, files=files)))
    assert decide(sft, basis_of(sft, {})).kind == "resume"


def test_the_parts_of_the_weights_count(file: Path) -> None:
    sft = stage(file, "sft")
    begin(sft, basis_of(sft, {}))
    (sft.path / HF / "model.safetensors").unlink()
    index, part = sft.path / HF / "model.safetensors.index.json", sft.path / HF / "model-2.safetensors"
    write_json(index, {"weight_map": {"a": "model-1.safetensors", "b": part.name}})
    part.with_name("model-1.safetensors").write_text("")
    seal(sft)
    with pytest.raises(ConfigError, match=f"{part}: is not there"):
        decide(sft, basis_of(sft, {}))
    part.write_text("")
    seal(sft)
    assert decide(sft, basis_of(sft, {})).kind == "resume"
    index.write_text("{")
    seal(sft)
    with pytest.raises(DataError, match=f"{index}: is no index of weights"):
        decide(sft, basis_of(sft, {}))


def test_a_run_that_ends_without_its_summary_is_not_finished(file: Path) -> None:
    sft = stage(file, "sft")
    basis = basis_of(sft, {})
    begin(sft, basis)
    with pytest.raises(DataError, match=r"sft/summary\.json: the stage ended without it; move .*/sft away"):
        write_finished(sft, basis, 1.0)


def test_deleting_the_record_does_not_accept_a_changed_model(file: Path) -> None:
    sft = stage(file, "sft")
    finish(sft)
    (sft.path / HF / "model.safetensors").write_text("W")
    (sft.path / "stage.json").unlink()
    with pytest.raises(DataError, match=rf"model\.safetensors: was changed after .* or move {sft.path} away to rerun"):
        decide(sft, basis_of(sft, {}))


def test_a_run_that_was_trained_on_by_hand_is_refused(file: Path) -> None:
    sft = stage(file, "sft")
    finish(sft)
    (sft.path / "checkpoints" / "step-3").rename(sft.path / "checkpoints" / "step-9")
    (sft.path / "checkpoints" / "LATEST").write_text("step-9\n")
    with pytest.raises(ConfigError, match=r"LATEST: was set from step-3 to step-9 after"):
        decide(sft, basis_of(sft, {}))


@pytest.mark.parametrize("text", ["{", "3", "{}", '{"basis": 3}', '{"basis": {}, "files": 3, "checkpoint": 1}'])
def test_a_corrupt_record(file: Path, text: str) -> None:
    sft = stage(file, "sft")
    finish(sft)
    (sft.path / "stage.json").write_text(text)
    with pytest.raises(DataError, match=r"stage\.json: is not the record of a stage .* Delete it"):
        decide(sft, basis_of(sft, {}))


def test_a_corrupt_run_directory(file: Path) -> None:
    sft = stage(file, "sft")
    basis = basis_of(sft, {})
    begin(sft, basis)
    (sft.path / "checkpoints" / "LATEST").write_text("step-7\n")
    with pytest.raises(DataError, match=r"LATEST: names 'step-7', which is not there; the folder holds step-3"):
        decide(sft, basis)
    (sft.path / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"config\.yaml: is missing; move .*/sft away"):
        decide(sft, basis)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_something_else_in_the_way(file: Path, kind: str) -> None:
    sft = stage(file, "sft")
    sft.path.parent.mkdir(parents=True)
    if kind == "file":
        sft.path.write_text("precious")
    else:
        sft.path.mkdir()
        (sft.path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match=r"/sft: is in the way of stage sft, and no run's directory"):
        decide(sft, basis_of(sft, {}))


def test_an_empty_directory_is_of_a_run_that_was_killed_at_its_very_start(file: Path) -> None:
    sft = stage(file, "sft")
    sft.path.mkdir(parents=True)
    assert decide(sft, basis_of(sft, {})).kind == "run"
