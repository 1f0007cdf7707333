"""A run's model that is used by another: compared with the hashes that were written with it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_dist.config.schema import ModelConfig
from rlhf_dist.errors import ModelError
from rlhf_dist.loop.pipeline_files import content, digest, model_files
from rlhf_dist.models.checkpoints import sealed
from rlhf_dist.models.hf import resolve
from rlhf_dist.models.run_model import check_run_model, run_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, of which step-4 is the newest."""
    for step in (2, 4):
        folder = tmp_path / "run" / "checkpoints" / f"step-{step}"
        (folder / "hf").mkdir(parents=True)
        for name in ("hf/config.json", "hf/model.safetensors", "optimizer-0.safetensors"):
            (folder / name).write_text(f"{name} of step {step}")
        (folder / "state.json").write_text(sealed(folder, {"step": step}))
    (tmp_path / "run" / "checkpoints" / "LATEST").write_text("step-4\n")
    return tmp_path / "run"


def test_the_newest_model_of_a_whole_run_is_taken(run: Path) -> None:
    check_run_model(str(run), "model.path")
    assert run_model(run, "model.path") == run / "checkpoints" / "step-4" / "hf"
    for no_run in (
        "tiny",
        "someone/model",
        str(run / "checkpoints" / "step-4" / "hf"),
        "./nowhere",
        "~nobody-of-this-name/x",
    ):
        check_run_model(no_run, "model.path")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda last: (last / "hf/model.safetensors").write_text("hf/model.safetensors of step 2"),
            "was changed after",
        ),
        (lambda last: (last / "hf/config.json").unlink(), "config.json: is missing"),
        (lambda last: (last / "hf/more.safetensors").touch(), "more.safetensors: is not part of this checkpoint"),
        (lambda last: (last / "state.json").unlink(), "state.json: is missing"),
    ],
)
def test_a_changed_model_is_refused_and_a_whole_one_is_offered(
    run: Path, damage: Callable[[Path], object], said: str
) -> None:
    last = run / "checkpoints" / "step-4"
    damage(last)
    with pytest.raises(ModelError) as raised:
        check_run_model(str(run), "scoring.rewards.judge.path")
    message = str(raised.value)
    assert message.startswith(f"scoring.rewards.judge.path = {run}: {last}/") and said in message
    whole = last.with_name("step-2") / "hf"
    assert message.endswith(
        f"; give scoring.rewards.judge.path={whole}, which is as it was written, or {last}/hf to use it unchecked"
    )
    check_run_model(str(whole), "model.path")
    shutil.rmtree(whole.parent)
    with pytest.raises(ModelError, match=rf"; give another model, or {last}/hf to use it unchecked"):
        check_run_model(str(run), "model.path")


def test_what_is_not_of_the_model_does_not_count(run: Path) -> None:
    (run / "checkpoints" / "step-4" / "optimizer-0.safetensors").unlink()
    check_run_model(str(run), "model.path")


def test_a_model_of_format_1_has_no_hashes(run: Path) -> None:
    (run / "checkpoints" / "step-4" / "state.json").write_text('{"step": 4}')
    (run / "checkpoints" / "step-4" / "hf" / "config.json").write_text("changed")
    check_run_model(str(run), "model.path")


def test_a_damaged_latest_is_told_by_key(run: Path) -> None:
    (run / "checkpoints" / "LATEST").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=rf"^critic\.start = {run}: .*LATEST: is not UTF-8 text .* step-2, step-4"):
        check_run_model(str(run), "critic.start")


def test_the_best_model_is_taken_where_it_is_asked_for(run: Path) -> None:
    pointer = run / "checkpoints" / "BEST"
    pointer.write_text("step-2\n")
    model = pointer.with_name("step-2") / "hf"
    assert run_model(pointer, "model.path") == model
    assert resolve(ModelConfig(path=str(pointer)), run).path == str(model)
    assert content(pointer) == digest(model_files(model.parent))
    check_run_model(str(pointer), "model.path")
    (model / "config.json").write_text("changed")
    with pytest.raises(
        ModelError, match=rf"^model\.path = {pointer}: {model}/config\.json: .*give model\.path=.*step-4"
    ):
        check_run_model(str(pointer), "model.path")
    for text in ("step-3", "", "../../x"):
        pointer.write_text(text)
        with pytest.raises(
            ModelError, match="BEST: names no checkpoint that is there; the folder holds step-2, step-4"
        ):
            check_run_model(str(pointer), "model.path")


def test_a_checkpoint_is_its_own_model(run: Path) -> None:
    older = run / "checkpoints" / "step-2"
    assert run_model(older, "model.path") == older / "hf"
    check_run_model(str(older), "model.path")
    (older / "hf" / "config.json").write_text("another")
    with pytest.raises(ModelError, match=r"config.json: has 7 bytes, and had 24; give model.path=.*step-4/hf"):
        check_run_model(str(older), "model.path")
