"""Steps whose numbers go wrong in virtual time, with each policy; and mistakes in what is done about them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from mistakes import Mistake, made

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from chaos.plan import CRITIC, LEARNER, REFERENCE, Fault, Plan, Settings
from chaos.search import Found, search

from rlhf_dist.loop import rebuilding, rl_training, step
from rlhf_dist.loop.numbers_faults import Numbers
from rlhf_dist.loop.resumed_prompts import ResumedPrompts

PATCH = pytest.MonkeyPatch
SKIP = Settings(steps=8, critic=1, reference=1, witness=True, on_fault="skip")
BACK = Settings(steps=4, critic=1, reference=1, keep=3, on_fault="roll_back")
ONCE, CRITICS = Fault(0, "nan", LEARNER, 30.0), Fault(0, "nan", CRITIC, 30.0)
FAR, POISON = Fault(0, "far", f"{REFERENCE} 0", 30.0), Fault(0, "poison", LEARNER, 50.0)
OFTEN = Fault(0, "nan", LEARNER, 30.0, 3.0)


def holds(settings: Settings, *faults: Fault) -> Found:
    found = search(Plan(1, settings, faults))
    assert found.broken is None, str(found.broken)
    return found


@pytest.mark.parametrize("fault", [ONCE, CRITICS, FAR])
def test_a_step_is_skipped_or_rolled_back_and_the_run_goes_on(fault: Fault) -> None:
    found = holds(SKIP, fault)
    assert found.endings == {"finished": 1} and found.seen["numbers that went wrong"] == 1
    assert "rolled back" not in found.seen
    found = holds(BACK, fault)
    assert found.endings == {"finished": 1} and found.seen["rolled back"] == 1


@pytest.mark.parametrize("fault", [ONCE, CRITICS, FAR])
def test_a_run_that_stops_for_it_is_resumed_to_what_nothing_disturbs(fault: Fault) -> None:
    settings = Settings(critic=1, reference=1, kept=1, witness=True)
    assert holds(settings, fault).endings == {"NumbersError": 1, "finished": 1}


def test_a_state_that_is_the_cause_is_gone_back_behind() -> None:
    found = holds(BACK, POISON)
    assert found.endings == {"finished": 1}
    assert (found.seen["rolled back"], found.seen["rolled back again"]) == (1, 1)


@pytest.mark.parametrize("settings", [SKIP, BACK])
def test_faults_without_end_end_the_run(settings: Settings) -> None:
    found = holds(settings, OFTEN)
    assert found.endings == {"NumbersError": 1, "finished": 1} and found.seen["numbers that went wrong"] == 4
    assert holds(SKIP, POISON).endings == {"NumbersError": 1, "finished": 1}


def as_learnt(patch: PATCH) -> None:
    patch.setattr(step, "groups_learnt", lambda groups, *_: (True,) * groups)


def sampled_again(patch: PATCH) -> None:
    real = ResumedPrompts.__init__
    patch.setattr(ResumedPrompts, "__init__", lambda self, stream, groups, *_: real(self, stream, groups))


def counted_anew(patch: PATCH) -> None:
    real = Numbers.faulted

    def faulted(self: Numbers, *args: Any) -> None:
        self._recent.clear()
        real(self, *args)

    patch.setattr(Numbers, "faulted", faulted)


MISTAKES: dict[str, tuple[Settings, Fault, Mistake]] = {
    "nobody is told": (SKIP, ONCE, Mistake(lambda p: p.setattr(Numbers, "faulted", lambda *_: None), ["numbers"])),
    "what is skipped counts as trained": (SKIP, FAR, Mistake(as_learnt, ["ledger", "raised", "witness"])),
    "faults are skipped without end": (SKIP, POISON, Mistake(counted_anew, ["numbers"])),
    "what is left out is sampled again": (BACK, ONCE, Mistake(sampled_again, ["rolled back"])),
    "what is left out is not dropped": (
        BACK,
        ONCE,
        Mistake(lambda p: p.setattr(rl_training, "leave_out", lambda *_: None), ["lost"]),
    ),
    "a state that is the cause is used again": (
        BACK,
        POISON,
        Mistake(lambda p: p.setattr(rebuilding, "before", lambda *_: None), ["rolled back"]),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str) -> None:
    settings, fault, mistake = MISTAKES[name]
    with made(mistake):
        found = search(Plan(1, settings, (fault,)))
    assert found.broken is not None and found.broken.rule in mistake.rules, str(found.broken)
