"""What `--resume` can tell before anything is started or written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from rlhf_dist.config.load import to_yaml
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ConfigError, DataError
from rlhf_dist.loop.resume_point import require_command, require_none_written, resume_point
from rlhf_dist.loop.run_directory import require_run
from rlhf_dist.loop.run_end import read_summary
from rlhf_dist.loop.run_lock import looked_at, require_place
from rlhf_dist.loop.saved_config import CHANGEABLE, require_same_config
from rlhf_dist.models.checkpoints import checkpoint_steps, read_sealed
from rlhf_dist.planning.placement import Command

SUMMARY_STEP = "step"
"""In `summary.json`: the step that the run ended at; null where its ledger did not add up."""


class HasStep(Protocol):
    """The state in a checkpoint."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...


S = TypeVar("S", bound=HasStep)


@dataclass(frozen=True, slots=True)
class Start(Generic[S]):
    """Where a run begins. `folder` and `state` are None in a new run, and in one that has no checkpoint yet."""

    resume: bool = False
    folder: Path | None = None
    """The checkpoint, which passed every check."""
    state: S | None = None
    unchecked: bool = False
    """The checkpoint is of format 1 and has no hashes."""


def find_start(
    config: Config, command: Command, resume: bool, step: int | None, read_state: Callable[[Path], S]
) -> Start[S]:
    """Check what is to be resumed, before anything is started or written; a new run has nothing to check.

    `step`: of --resume-from; None for the newest checkpoint. `read_state` reads the state of a checkpoint folder.
    Raises ConfigError or DataError with the way out.
    """
    require_place(config.output, config.name)
    if not resume:
        return Start()
    run = Path(config.output) / config.name
    require_run(run)
    with looked_at(run):
        folder = resume_point(run, command, step)
        if folder is None:
            require_none_written(run)
            return Start(True)
        try:
            require_command(folder, command)
            state = read_state(folder)
        except DataError as error:
            others = [name for s in checkpoint_steps(folder.parent) if (name := f"step-{s}") != folder.name]
            way = f"resume with --resume-from {others[-1]}, or" if others else "restore it from a backup, or"
            raise DataError(f"{error}; {way} start a new run with another name=") from None
        return Start(True, folder, state, read_sealed(folder).files is None)


def nothing_left(config: Config, key: str, target: int, start: Start[S]) -> bool:
    """Whether the run ended at step `target`, the value of the config key `key`; prints so. Writes nothing.

    A run that has its last checkpoint and was cut before its summary is not at its end. Raises ConfigError when the run
    is beyond `target`, or when a key has changed that a resume cannot change.
    """
    run, folder = Path(config.output) / config.name, start.folder
    if folder is None or start.state is None:
        return False
    step = start.state.step
    if step > target:
        raise ConfigError(
            f"{key} is {target}, but {folder} is at step {step} already; give at least {step}, or another name= for "
            "a new run"
        )
    require_same_config(run / "config.yaml", to_yaml(config))
    if step < target or summary_step(run) != step:
        return False
    # Where the length shapes what was learnt (the learning rate's course), only another run can be longer.
    onward = f"raise {key} to go on" if key in CHANGEABLE else f"go on in a new run with name=... model.path={run}"
    print(f"{config.name} is already at step {step} of {target}; {onward}")
    return True


def summary_step(run: Path) -> int | None:
    """The step that the finished run of the directory ended at; None without a summary that says it."""
    return (read_summary(run) or {}).get(SUMMARY_STEP)


def resumed(folder: Path | None) -> str:
    """Where a resume goes on, in words; `folder` is the checkpoint."""
    if folder is None:
        return "no checkpoint yet: beginning again from step 0"
    return f"resumed from step {folder.name.removeprefix('step-')}"
