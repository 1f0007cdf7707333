"""What `--resume` can tell before anything is started or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rlhf_dist.config.schema import Config
from rlhf_dist.errors import ConfigError
from rlhf_dist.loop.run_directory import CHANGEABLE, latest_checkpoint

SUMMARY_STEP = "step"
"""In `summary.json`: the step that the run ended at; null where its ledger did not add up."""


class HasStep(Protocol):
    """The state in a checkpoint."""

    @property
    def step(self) -> int:
        """Steps done."""
        ...


def nothing_left(config: Config, key: str, target: int, read_state: Callable[[Path], HasStep]) -> bool:
    """Whether the run ended at step `target`, the value of the config key `key`; prints so. Writes nothing.

    A run that has its last checkpoint and was cut before its summary is not at its end. `read_state` reads the state
    of a checkpoint folder. Raises ConfigError when the run is beyond `target`, DataError for a broken checkpoint.
    """
    run = Path(config.output) / config.name
    folder = latest_checkpoint(run)
    if folder is None:
        return False
    step = read_state(folder).step
    if step > target:
        raise ConfigError(
            f"{key} is {target}, but {folder} is at step {step} already; give at least {step}, or another name= for "
            "a new run"
        )
    if step < target or summary_step(run) != step:
        return False
    # Where the length shapes what was learnt (the learning rate's course), only another run can be longer.
    onward = f"raise {key} to go on" if key in CHANGEABLE else f"go on in a new run with name=... model.path={run}"
    print(f"{config.name} is already at step {step} of {target}; {onward}")
    return True


def summary_step(run: Path) -> int | None:
    """The step that the summary of the run directory is about; None without a summary that says it."""
    try:
        found: Any = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found.get(SUMMARY_STEP) if isinstance(found, dict) else None


def resumed(folder: Path | None) -> str:
    """Where a resume goes on, in words; `folder` is the newest checkpoint."""
    if folder is None:
        return "no checkpoint yet: beginning again from step 0"
    return f"resumed from step {folder.name.removeprefix('step-')}"
