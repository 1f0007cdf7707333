"""The model of a run directory: the newest checkpoint's, compared with what was written."""

from __future__ import annotations

from pathlib import Path

from rlhf_dist.config.paths import expanded
from rlhf_dist.errors import DataError, ModelError
from rlhf_dist.models.checkpoints import (
    CHECKPOINT_PREFIX,
    HF_FOLDER,
    LATEST,
    checkpoint_steps,
    latest_checkpoint,
    problems,
)


def newest_model(run: Path, key: str) -> Path | None:
    """The Hugging Face directory in the checkpoint that LATEST names; None if `run` is not a run directory.

    `key` is the config key that the path stands in. Raises ModelError: a run without a checkpoint, a damaged LATEST.
    """
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
    run = expanded(path)
    model = newest_model(run, key) if run.is_dir() else None
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
