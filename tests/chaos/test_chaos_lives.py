"""Ranks that are lost and rebuilt inside a run, states in memory, runs that are told to end, the witness."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mistakes import Mistake, made

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.plan import CRITIC, LEARNER, WORKER, Fault, Kind, Plan, Settings
from chaos.search import Found, search

from rlhf_dist.config.schema import FaultsConfig
from rlhf_dist.loop import rebuilding, rl_training, step
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.saving import Saver
from rlhf_dist.types import Request

PATCH = pytest.MonkeyPatch
KEPT = Settings(steps=3, critic=1, reference=1, evaluate=1, checkpoint=0, workers=2, kept=1, witness=True)


def holds(*faults: Fault, settings: Settings = KEPT) -> Found:
    found = search(Plan(1, settings, faults))
    assert found.broken is None, str(found.broken)
    return found


@pytest.mark.parametrize("who", [LEARNER, CRITIC])
@pytest.mark.parametrize("kind", ["die", "wedge", "stall"])
def test_a_rank_is_lost_at_any_time_and_the_run_goes_on(kind: Kind, who: str) -> None:
    """In the first push, an evaluation, a step, a push, while its state is kept: about each second of two steps."""
    starts = 0
    for at in range(0, 60, 3):
        found = holds(Fault(0, kind, who, float(at)))
        assert found.endings == {"finished": 1}
        starts += sum(count for what, count in found.seen.items() if what.startswith("ranks began anew"))
    assert starts >= 15


def test_ranks_are_lost_again_while_they_start() -> None:
    again = [Fault(0, "die", LEARNER, 20.0), Fault(0, "no start", LEARNER), Fault(0, "no start", CRITIC)]
    assert holds(*again).endings == {"finished": 1}


def test_ranks_that_are_lost_too_often_end_the_run_whose_state_is_brought_to_the_disk() -> None:
    often = [Fault(0, "no start", LEARNER)] * FaultsConfig().respawns
    found = holds(Fault(0, "die", LEARNER, 80.0), *often)
    assert found.endings == {"ActorLost": 1, "finished": 1} and found.seen["memory was brought to the disk"] == 1


def test_memory_may_be_full() -> None:
    full = Fault(0, "full", "memory: mkdir unfinished", 1, 1000.0)
    assert holds(full, Fault(0, "die", LEARNER, 80.0)).endings == {"finished": 1}


def test_a_run_is_told_to_end_at_any_time_and_saves_its_last_step() -> None:
    saved = 0
    for at in range(0, 120, 4):
        found = holds(Fault(0, "end", "", float(at)), Fault(0, "slow", f"{WORKER} 0", 10.0, 20.0))
        assert found.endings == {"Ended": 1, "finished": 1} or found.endings == {"finished": 1}
        saved += found.seen["saved on stop"]
    assert saved > 8


@pytest.mark.parametrize("name", ["mkdir unfinished", "write weights", "write critic", "rename step", "remove"])
@pytest.mark.parametrize("kind", ["crash before", "torn", "crash after", "full"])
def test_a_write_into_memory_fails_or_is_the_last(kind: Kind, name: str) -> None:
    for number in (1, 2, 4):
        found = holds(Fault(0, kind, f"memory: {name}", number), Fault(0, "die", LEARNER, 80.0))
        assert found.lives == 1 if kind == "full" else found.lives == 2 or number == 4


def never_back(patch: PATCH) -> None:
    patch.setattr(rebuilding, "put_back", lambda *_: None)


def without_memory(patch: PATCH) -> None:
    real = rebuilding.newest

    def newest(run: Any, loss: Exception) -> Any:
        kept, latest = run.kept, KeptState.newest
        with pytest.MonkeyPatch.context() as inner:
            if kept is not None:
                inner.setattr(KeptState, "newest", lambda _: None)
            found = real(run, loss)
        assert KeptState.newest is latest
        return found

    patch.setattr(rebuilding, "newest", newest)


def ends_unsaved(patch: PATCH) -> None:
    real = Saver.end_if_asked

    def end_if_asked(self: Saver) -> None:
        self._saved = self._last
        real(self)

    patch.setattr(Saver, "end_if_asked", end_if_asked)


def a_row_less(patch: PATCH) -> None:
    real = step.rows_to_train
    patch.setattr(step, "rows_to_train", lambda *args: real(*args)[:-1])


LATE = Fault(0, "die", LEARNER, 80.0)
OFTEN = (LATE, *[Fault(0, "no start", LEARNER)] * FaultsConfig().respawns)
BUSY = (Fault(0, "die", LEARNER, 12.0), Fault(0, "slow", f"{WORKER} 0", 2.0, 30.0))
MISTAKES: dict[str, tuple[tuple[Fault, ...], Mistake]] = {
    "a run that begins again from its start does not begin there": (BUSY, Mistake(never_back, ["lost", "uncut"])),
    "what is in memory is not used": ((LATE,), Mistake(without_memory, ["repeated"])),
    "what is in memory is not brought to the disk": (
        OFTEN,
        Mistake(lambda p: p.setattr(rebuilding, "bring_to_disk", lambda *_: None), ["saved"]),
    ),
    "what is in memory stays there": (
        (),
        Mistake(lambda p: p.setattr(KeptState, "close", lambda self: self._lock.close()), ["left over"]),
    ),
    "the last step is not saved": ((Fault(0, "end", "", 80.0),), Mistake(ends_unsaved, ["saved"])),
    "what is under way goes on after a rebuild": (
        BUSY,
        Mistake(lambda p: p.setattr(rebuilding, "stand_still", lambda *_: None), ["left over", "raised", "uncut"]),
    ),
    "members keep their work through a rebuild": (
        BUSY,
        Mistake(lambda p: p.setattr(Members, "begin_anew", lambda _: []), ["left over", "unexplained", "raised"]),
    ),
    "requests of all lives have the same names": (
        BUSY,
        Mistake(lambda p: p.setattr(Request, "life", property(lambda _: 0)), ["weights", "uncut", "raised"]),
    ),
    "the optimizer takes less than planned": ((), Mistake(a_row_less, ["unexplained", "raised"])),
    "the ledger is not told what the optimizer took": (
        (),
        Mistake(lambda p: p.setattr(rl_training, "verified", lambda *_: None), ["witness"]),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str) -> None:
    faults, mistake = MISTAKES[name]
    # A state in memory would be brought to the disk all the same.
    settings = replace(KEPT, kept=0) if name == "the last step is not saved" else KEPT
    with made(mistake, account=False):
        found = search(Plan(1, settings, faults))
    assert found.broken is not None and found.broken.rule in mistake.rules, str(found.broken)
