"""The model of a run: the newest checkpoint's or the best one's, compared with what was written."""

from __future__ import annotations

from pathlib import Path

from rlhf_dist.config.paths import expanded
from rlhf_dist.errors import DataError, ModelError
from rlhf_dist.models.checkpoints import (
    BEST,
    CHECKPOINT_PREFIX,
    HF_FOLDER,
    LATEST,
    STATE_FILE,
    STEP_NAME,
    best_checkpoint,
    checkpoint_steps,
    latest_checkpoint,
    problems,
)


def run_model(path: Path, key: str) -> Path | None:
    """The Hugging Face directory of the newest checkpoint of the run at `path`, of the best one where `path` is a run's
    `checkpoints/BEST`, or of the checkpoint where it is one; None for what is none of them.

    `key` is the config key that the path stands in. Raises ModelError: a run without a checkpoint, a damaged LATEST or
    BEST.
    """
    if path.name == BEST and path.is_file():
        return _best_model(path, key)
    if STEP_NAME.fullmatch(path.name) and (path / STATE_FILE).is_file() and (path / HF_FOLDER).is_dir():
        return path / HF_FOLDER
    return _newest_model(path, key) if path.is_dir() else None


def _best_model(path: Path, key: str) -> Path:
    checkpoint = best_checkpoint(path.parent.parent)
    if checkpoint is None or not (checkpoint / HF_FOLDER).is_dir():
        names = [f"{CHECKPOINT_PREFIX}{step}" for step in checkpoint_steps(path.parent)]
        raise ModelError(f"{key} = {path}: names no checkpoint that is there; the folder holds {', '.join(names)}")
    return checkpoint / HF_FOLDER


def _newest_model(run: Path, key: str) -> Path | None:
    try:
        checkpoint = latest_checkpoint(run)
    except DataError as error:
        raise ModelError(f"{key} = {run}: {error}") from None
    if checkpoint is None:
        if (run / "checkpoints").is_dir() or ((run / "config.yaml").is_file() and not (run / "config.json").is_file()):
            raise ModelError(
                f"{key} = {run}: this run has no finished checkpoint ({run}/checkpoints/{LATEST} is not there); finish "
                "it with --resume, or let a run write one earlier: loop.checkpoint_every (train), sft.checkpoint_every "
                "(sft), reward.eval_every (reward)"
            )
        return None
    if not (checkpoint / HF_FOLDER).is_dir():
        raise ModelError(f"{key} = {run}: {checkpoint / HF_FOLDER} is not there; give another run")
    return checkpoint / HF_FOLDER


def check_run_model(path: str, key: str) -> None:
    """Compare the model of a run with the hashes that were written with it; what is not a run has none.

    Raises ModelError naming the first file that was changed, and another model of the run that was not.
    """
    model = run_model(expanded(path), key)
    if model is None:
        return
    wrong = problems(model.parent, f"{HF_FOLDER}/")
    if not wrong:
        return
    folder = model.parent.parent
    others = [folder / f"{CHECKPOINT_PREFIX}{step}" for step in reversed(checkpoint_steps(folder))]
    whole = next((other for other in others if not problems(other, f"{HF_FOLDER}/")), None)
    way = f"give {key}={whole / HF_FOLDER}, which is as it was written" if whole else "give another model"
    raise ModelError(f"{key} = {path}: {wrong[0]}; {way}, or {model} to use it unchecked")
