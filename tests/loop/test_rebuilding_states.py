"""What a lost rank's run goes on from, and what becomes of a state that only memory has; as in `test_rebuilding`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_kept_state
import test_rebuilding
from test_loop_rl_training import STEPS
from test_rebuilding import WEIGHTS, Ran, config, nothing, once, whole
from test_saving import Told

from rlhf_dist.errors import ActorLost, CommandHung, NoMemory, RanksLost
from rlhf_dist.loop.checkpointing import TO_END_S
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.loop.rebuilding import train_to_the_end
from rlhf_dist.loop.train_state import read_state
from rlhf_dist.models.checkpoints import problems

memory, make = test_kept_state.memory, test_rebuilding.make
LIMIT_S = 20.0


def test_one_that_is_told_to_end_right_after_it_saves_what_was_in_memory_alone(make: Callable[..., Ran]) -> None:
    ran = make(once("update", 4), config(2, keep=1))
    ran.run = replace(ran.run, stop=Told(lambda: bool(ran.ranks.folders)))
    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(ran.run, None)
    assert [folder.name for folder in ran.ranks.folders if folder] == ["step-3"]
    saved = ran.run.directory.latest_checkpoint()
    assert saved is not None and saved.name == "step-3"


def test_a_damaged_checkpoint_is_not_gone_on_from(make: Callable[..., Ran]) -> None:
    ran = make(nothing, config(2))

    def damage(call: str, count: int) -> None:
        if (call, count) == ("update", 4):
            folder = ran.run.directory.latest_checkpoint()
            assert folder is not None
            (folder / WEIGHTS).write_text("0")
            raise RanksLost("gone")

    ran.learner.fault = damage
    with pytest.raises(ActorLost, match=r"weights\.txt: "):
        train_to_the_end(ran.run, None)


def test_a_damaged_state_in_memory_is_passed_over(make: Callable[..., Ran]) -> None:
    ran = make(nothing, config(2, keep=1))

    def damage(call: str, count: int) -> None:
        if (call, count) == ("update", 4):
            folder = ran.run.kept.newest() if ran.run.kept else None
            assert folder is not None and folder.name == "step-3"
            (folder / WEIGHTS).write_text("0")
            raise RanksLost("gone")

    ran.learner.fault = damage
    train_to_the_end(ran.run, None)
    assert [found["step"] for found in ran.facts()] == [2]


@pytest.mark.parametrize("why", [RanksLost, KeyboardInterrupt])
def test_a_run_that_ends_brings_the_state_that_only_memory_has_to_the_disk(
    make: Callable[..., Ran], why: type[BaseException]
) -> None:
    def always(call: str, count: int) -> None:
        if call == "update" and count >= 3:
            raise why("learner rank 0 died")

    ran = make(always, config(0, 1))
    with pytest.raises(ActorLost if why is RanksLost else why):
        train_to_the_end(ran.run, None)
    saved = ran.run.directory.latest_checkpoint()
    assert saved is not None and saved.name == "step-2" and problems(saved) == []
    assert read_state(saved).step == 2


@pytest.mark.parametrize("answers", [True, False])
def test_a_command_that_has_hung_brings_it_to_the_disk_as_long_as_it_lives(
    make: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    """Where the disk does not answer in that time, either, it says what is lost."""
    again, send = threading.Event(), os.sendfile

    def waits(*words: Any) -> int:
        assert again.wait(LIMIT_S)
        return send(*words)

    def hung(message: str) -> CommandHung:
        return CommandHung(message, until=time.monotonic() + TO_END_S + (LIMIT_S if answers else 0.5))

    ran = make(once("update", 3, hung), config(0, 1))
    if not answers:
        monkeypatch.setattr(os, "sendfile", waits)
    with pytest.raises(CommandHung):
        train_to_the_end(ran.run, None)
    saved = ran.run.directory.latest_checkpoint()
    told = [event["message"] for event in ran.events if event["kind"] == "warning"]
    if answers:
        assert saved is not None and saved.name == "step-2" and told == []
    else:
        (lost,) = told
        assert saved is None and lost.startswith("the state of step 2, which only memory had, was not saved")
    again.set()


def test_what_the_disk_has_already_is_not_written_again(make: Callable[..., Ran]) -> None:
    def stopped(call: str, count: int) -> None:
        if call == "update" and count == 3:
            raise KeyboardInterrupt

    ran = make(stopped, config(1, 1))
    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(ran.run, None)
    assert sum("from memory" in event["message"] for event in ran.events) == 0


def test_a_state_that_finds_no_room_in_memory_is_a_warning(
    make: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise NoMemory("/dev/shm/x: cannot be written: No space left on device")

    monkeypatch.setattr(KeptState, "commit", full)
    ran = whole(make, nothing, config(0, 1))
    told = [event["message"] for event in ran.events if event["kind"] == "warning"]
    assert told == [
        f"step {step}: its state is not kept: /dev/shm/x: cannot be written: No space left on device"
        for step in range(1, STEPS)
    ]
