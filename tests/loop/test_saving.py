"""A run that is told to end saves its last whole step, and the resume equals the run that was not told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from stand_ins import FakeCritic, FakePolicy, FakeReference, FakeRollouts, lines
from test_loop_rl_training import CONFIG, LEASHED, STEPS, close, whole, wired

from rlhf_dist.config.schema import Config, ReferenceConfig
from rlhf_dist.data.stream import PromptStream
from rlhf_dist.errors import DiskError
from rlhf_dist.loop.rl_training import Run, train
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.train_state import State, read_state
from rlhf_dist.models.checkpoints import checkpoint_steps

STREAM = [prompt.uid for prompt in PromptStream(CONFIG.data, CONFIG.seed, CONFIG.eval.prompts).take(15)]
DROPS = (STREAM[1], STREAM[4], STREAM[9])
"""One is dropped in each of the first three steps: the stream goes on while the step's groups are waited for."""


@dataclass
class Told:
    """Tells the run to end when `when` says so."""

    when: Callable[[], bool]
    notes: list[str] = field(default_factory=list)

    def deferred(self) -> AbstractContextManager[None]:
        return nullcontext()

    def asked(self) -> bool:
        return self.when()

    def left_s(self) -> float:
        return 0.0

    def tell(self, note: str) -> None:
        self.notes.append(note)


def after_updates(policy: FakePolicy, count: int, looks: int = 0) -> Callable[[], bool]:
    """From the update number `count` on, once the run has looked `looks` times since."""
    seen = 0

    def when() -> bool:
        nonlocal seen
        seen += policy.updates == count
        return policy.updates > count or seen > looks

    return when


def stopped(path: Path, updates: int, looks: int = 0, config: Config = CONFIG, **parts: Any) -> tuple[Run, Told]:
    """A run that is told to end after so many updates."""
    policy = FakePolicy()
    stop = Told(after_updates(policy, updates, looks))
    run = wired(path, config, policy=policy, rollouts=FakeRollouts(drops=DROPS), stop=stop, **parts)
    with pytest.raises(KeyboardInterrupt):
        train(run, None)
    close(run)
    return run, stop


def newest(run: Run) -> State | None:
    folder = run.directory.latest_checkpoint()
    return None if folder is None else read_state(folder)


def told(directory: RunDirectory) -> list[dict[str, Any]]:
    """The metrics, but for times."""
    times = ("time/", "goodput/", "rollout/group_s", "rollout/response_tokens_per_s")
    return [{k: v for k, v in line.items() if not k.startswith(times)} for line in lines(directory.metrics)]


@pytest.mark.parametrize(("every", "looks"), [(2, 0), (2, 1), (0, 0), (0, 1), (0, 2)])
@pytest.mark.parametrize("updates", [1, 2, 3])
def test_the_resume_equals_the_run_that_was_not_told_to_end(
    tmp_path: Path, updates: int, every: int, looks: int
) -> None:
    """Whenever it is told: as a step ends, or while groups are scored, dropped and replaced by others.

    With an evaluation after step 2 that has happened before the step's checkpoint is written.
    """
    config = replace(CONFIG, eval=replace(CONFIG.eval, every=every))
    run, stop = stopped(tmp_path / "cut", updates, looks, config)
    state = newest(run)
    assert state is not None and state.step == updates and stop.notes == [f"step {updates} is saved"]
    again = wired(tmp_path / "cut", config, again=True, rollouts=FakeRollouts(drops=DROPS))
    outcome = train(again, state)
    proof = again.ledger.proof()
    close(again)
    plain = whole(tmp_path / "whole", config, rollouts=FakeRollouts(drops=DROPS))
    assert told(again.directory) == told(plain.directory)
    assert proof.holds and proof.in_flight == 0 and dict(proof.dropped) == {"prompt_empty": len(DROPS)}
    last, other = newest(again), newest(plain)
    assert last is not None and other is not None and last.cursor == other.cursor and last.open == {}
    assert outcome.after == other.results


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    run, stop = stopped(tmp_path, updates=2, looks=1)
    written = [event for event in lines(run.directory.events) if event["kind"] == "checkpoint"]
    assert [event["facts"]["step"] for event in written] == [2] and stop.notes == ["step 2 is saved"]


def test_after_a_resume_there_is_nothing_to_save_before_the_next_step(tmp_path: Path) -> None:
    run, _ = stopped(tmp_path, updates=2)
    stop = Told(lambda: True)
    again = wired(tmp_path, again=True, policy=FakePolicy(saves=False), stop=stop)
    with pytest.raises(KeyboardInterrupt):
        train(again, newest(run))
    close(again)
    assert stop.notes == ["step 2 is saved"] and checkpoint_steps(again.directory.checkpoints) == [2]


def test_before_the_first_step_is_done_there_is_nothing_to_save(tmp_path: Path) -> None:
    run, stop = stopped(tmp_path, updates=0, looks=1)
    assert newest(run) is None and stop.notes == ["no step was finished yet"]


def test_a_run_that_is_at_its_end_just_ends(tmp_path: Path) -> None:
    policy = FakePolicy()
    stop = Told(after_updates(policy, STEPS))
    run = whole(tmp_path, policy=policy, stop=stop)
    assert checkpoint_steps(run.directory.checkpoints)[-1] == STEPS and stop.notes == []


def test_a_step_that_cannot_be_saved_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    policy = FakePolicy()
    stop = Told(after_updates(policy, 3))
    run = wired(tmp_path, policy=policy, stop=stop)
    policy.save = lambda folder: FakePolicy.save(policy, folder) if policy.updates < 3 else None
    with pytest.raises(DiskError, match=r"step-3: .* did not arrive"):
        train(run, None)
    close(run)
    state = newest(run)
    assert state is not None and state.step == 2 and stop.notes == []


def test_the_state_is_that_of_the_steps_end(tmp_path: Path) -> None:
    """Not of the moment of the signal: a group that was dropped since then is open in it."""
    config = replace(CONFIG, eval=replace(CONFIG.eval, every=0))
    run, _ = stopped(tmp_path, updates=2, looks=3, config=config)
    folder = run.directory.latest_checkpoint()
    assert folder is not None
    written = json.loads((folder / "state.json").read_text())
    assert list(written["open"]) == STREAM[8:11]
    rollouts: Any = run.actors.rollouts
    assert STREAM[11] in rollouts.served, "by the time of the signal another had taken its place"


def test_what_was_dropped_before_the_state_was_taken_stays_dropped(tmp_path: Path) -> None:
    """With a lag the next groups are under way while the reference, which moves before they count, is evaluated."""
    loop = replace(LEASHED.loop, max_policy_lag=1)
    moving = ReferenceConfig(update_every=1)
    config = replace(LEASHED, loop=loop, reference=moving, eval=replace(LEASHED.eval, every=1))
    for updates in (1, 2, 3):
        path = tmp_path / str(updates)
        run, _ = stopped(path, updates, 0, config, critic=FakeCritic(), reference=FakeReference())
        parts: dict[str, Any] = {"critic": FakeCritic(), "reference": FakeReference()}
        again = wired(path, config, again=True, rollouts=FakeRollouts(drops=DROPS), **parts)
        train(again, newest(run))
        proof = again.ledger.proof()
        close(again)
        assert proof.holds and dict(proof.dropped) == {"prompt_empty": len(DROPS)}, updates
