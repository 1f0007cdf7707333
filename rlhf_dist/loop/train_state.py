"""What an RL run's checkpoint holds besides weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_dist.data.stream import Cursor, PromptStream
from rlhf_dist.loop.ledger import LedgerTotals
from rlhf_dist.loop.shaper import Shaper, ShaperState
from rlhf_dist.loop.state import read_state_of, state_of
from rlhf_dist.loop.watch import CollapseWatch, WatchState
from rlhf_dist.models.checkpoints import STATE_FILE


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint holds besides weights and optimizer: enough to go on exactly where it was."""

    step: int
    """Training steps done; also the weight version."""
    steps: int
    """`loop.steps` of the run that wrote it."""
    cursor: dict[str, int | str]
    """Of the prompt stream."""
    before: dict[str, float]
    """Evaluation before the first step, for the table at the end."""
    results: dict[str, float]
    """The latest evaluation."""
    answers: dict[str, list[str]] = field(default_factory=dict)
    """A few held-out `prompts` with the greedy answers `before` and the latest."""
    shaper: dict[str, Any] = field(default_factory=dict)
    """Of `Shaper`: running moments, KL coefficient."""
    watch: dict[str, Any] = field(default_factory=dict)
    """Of `CollapseWatch`."""
    ledger: LedgerTotals | None = None
    """As the ledger stood; None in a checkpoint of format 1."""
    open: dict[str, int] = field(default_factory=dict)
    """uid -> attempt of the groups that were under way or waited to be trained on, oldest first."""
    elapsed: float = 0.0
    """Seconds since the first step began; a time in which the run stood still is not in it."""
    evaluated: int | None = None
    """The step that `results` are of; None in a checkpoint that was written before there was this field."""


def read_state(folder: Path) -> State:
    """The state of a checkpoint folder. Raises `DataError` when it is not one of an RL run."""
    state, path = read_state_of(State, folder), folder / STATE_FILE
    state_of(Cursor, state.cursor, path)
    if state.shaper:
        state_of(ShaperState, state.shaper, path)
    if state.watch:
        state_of(WatchState, state.watch, path)
    return state


def put_back(state: State, stream: PromptStream, shaper: Shaper, watch: CollapseWatch) -> None:
    """Let them go on from the checkpoint. Raises ConfigError where the stream is of other data."""
    stream.restore(state.cursor)
    if state.shaper:
        shaper.restore(state.shaper)
    if state.watch:
        watch.restore(state.watch)
