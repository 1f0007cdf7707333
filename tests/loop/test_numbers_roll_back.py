"""Runs that go back for a step's numbers, more than once; processes are stand-ins, ledger and checkpoints are real."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_kept_state
from test_loop_rl_training import ALL, PROMPTS, close, warnings, wired
from test_numbers_faults import ORDER, config_of, ended, run_of, told

from rlhf_dist.config.schema import LearnerConfig
from rlhf_dist.errors import NumbersError
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.loop.numbers_faults import Fault, Numbers, RolledBack
from rlhf_dist.loop.rebuilding import train_to_the_end

memory = test_kept_state.memory
OVERFLOWS = pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


def test_two_faults_that_take_turns_do_not_roll_back_for_ever(tmp_path: Path) -> None:
    """Step 13 is passed each time that step 17 has led back to step 10, and step 17 never."""
    run = wired(tmp_path, config_of("roll_back", max_faults=3))
    numbers = Numbers(run.config, run.directory, run.telemetry)

    def fault(step: int, error: type[NumbersError]) -> None:
        with pytest.raises(NumbersError) as raised:
            numbers.faulted(step, Fault("numbers", "NaN", ()), lambda path, facts: None)
        assert type(raised.value) is error

    for step in (17, 13, 17):
        numbers.done(13 if step == 17 else 12)
        fault(step, RolledBack)
    numbers.done(13)
    fault(17, NumbersError)
    numbers.done(17)
    fault(18, RolledBack)
    close(run)


@OVERFLOWS
@pytest.mark.parametrize(("keep", "fault", "folders"), [(0, 6, ["step-2", "step-1"]), (1, 9, ["step-3", "step-2"])])
def test_a_second_roll_back_without_a_new_step_goes_to_the_state_before(
    tmp_path: Path, memory: Path, keep: int, fault: int, folders: list[str]
) -> None:
    """The first may be the cause. With `keep` it is in memory alone, and nothing goes on from there any more."""
    config = config_of("roll_back", checkpoint_every=2 if keep else 1)
    kept, newest = KeptState(keep) if keep else None, list[Path | None]()
    run = run_of(
        tmp_path,
        replace(config, learner=LearnerConfig(keep_state_every=keep)),
        [ORDER[fault], ORDER[fault + PROMPTS]],
        kept=kept,
    )
    ranks: Any = run.ranks
    ranks.meanwhile = lambda: newest.append(None if kept is None else kept.newest())
    train_to_the_end(run, None)
    proof, _ = ended(run)
    assert dict(proof.dropped) == {"rolled_back": 2 * PROMPTS} and proof.consumed == ALL
    assert [folder.name for folder in ranks.folders] == folders and newest[1] is None
    assert (run.directory.checkpoints / "step-2.set-aside").exists() == (not keep)
    assert [text.split(";")[2].split(",")[0] for text in told(run)] == [
        " the learner goes back to the newest state",
        f" the learner goes back to a state before {folders[0].replace('-', ' ')}'s",
    ]
    if kept is not None:
        kept.close()


@OVERFLOWS
def test_where_no_state_is_before_it_the_newest_is_used_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, config_of("roll_back"), [ORDER[6], ORDER[9]])
    train_to_the_end(run, None)
    ranks: Any = run.ranks
    ended(run)
    assert [folder.name for folder in ranks.folders] == ["step-2", "step-2"]
    assert "there is no sound checkpoint before step 2: the newest state is used again" in warnings(run.directory)
