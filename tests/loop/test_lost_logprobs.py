"""The reference's logprobs outlive their server once the collator has them; what is lost before is computed again."""

from __future__ import annotations

import pytest
from hand_made import Rig, compared, compared_and_kept, of_kind, rules_with, scores_of

from rlhf_dist.errors import ActorLost
from rlhf_dist.loop.events import (
    Compare,
    KeepReference,
    Kept,
    Lost,
    MemberKind,
    Pulse,
    ReferenceKept,
    Returned,
    Scored,
    Tell,
    Tick,
    TimedOut,
)
from rlhf_dist.loop.healing import Healing

KEY = "train/0/0/0"
KINDS: dict[str, MemberKind] = {"a": "rollout", "s": "scoring", "r": "reference", "collator": "collator"}


def rig(healing: bool = True) -> Rig:
    """A group that is kept and scored, and whose logprobs are on their way to the collator."""
    heals = Healing(KINDS, respawns=2, window_s=100.0, pulse_s=1e9, start_s=50.0) if healing else None
    made = Rig(rules_with(compares=True), healing=heals)
    for name in KINDS if healing else ():
        made.hear(Pulse(name))
    made.answer(KEY)
    for event in (Kept(KEY), Scored("s", KEY, scores_of((0.0, 1.0)))):
        made.hear(event)
    made.hear(compared(KEY))
    assert made.taken() is None, "the collator does not have them yet"
    return made


def test_those_that_are_lost_with_their_server_are_computed_by_the_one_that_is_back() -> None:
    made = rig()
    made.hear(Lost("r", "r died"))
    commands = made.hear(ReferenceKept(KEY, lost=True))
    assert of_kind(commands, Compare) == [], "no server is there"
    (told,) = of_kind(commands, Tell)
    assert told.kind == "asked_again" and told.uid == "0/0" and KEY in told.message
    assert [one.key for one in of_kind(made.hear(Returned("r")), Compare)] == [KEY]
    assert of_kind(made.hear(compared(KEY)), KeepReference) != []
    assert made.taken() is None
    made.hear(ReferenceKept(KEY))
    assert made.taken() == ["0/0"]


def test_a_server_that_lives_is_asked_again_at_once() -> None:
    made = rig()
    assert [one.key for one in of_kind(made.hear(ReferenceKept(KEY, lost=True)), Compare)] == [KEY]
    for event in compared_and_kept(KEY):
        made.hear(event)
    assert made.taken() == ["0/0"]


def test_what_is_heard_twice_changes_nothing() -> None:
    made = rig()
    made.hear(ReferenceKept(KEY, lost=True))
    assert made.hear(ReferenceKept(KEY, lost=True)) == [], "they are being computed"
    for event in compared_and_kept(KEY):
        made.hear(event)
    assert made.hear(ReferenceKept(KEY, lost=True)) == []
    taken, _ = made.take()
    assert taken is not None and taken.late == 2


def test_those_that_are_lost_again_and_again_end_the_run() -> None:
    made = rig()
    for _ in range(2):
        made.hear(ReferenceKept(KEY, lost=True))
        made.hear(compared(KEY))
    message = r"for train/0/0/0 was lost 3 times within 100 s \(faults\.window_s\), and is done again at most 2 times"
    with pytest.raises(ActorLost, match=message):
        made.hear(ReferenceKept(KEY, lost=True))


def test_where_nobody_is_started_again_they_are_not_computed_again() -> None:
    with pytest.raises(ActorLost, match="what a reference server computed for train/0/0/0 was lost"):
        rig(healing=False).hear(ReferenceKept(KEY, lost=True))


def test_a_collator_that_does_not_fetch_them_is_silent() -> None:
    made = rig()
    made.now = 39.0
    assert of_kind(made.hear(Tick()), TimedOut) == []
    made.now = 41.0
    assert [late.member for late in of_kind(made.hear(Tick()), TimedOut)] == ["collator"]
    made.hear(ReferenceKept(KEY))
    assert of_kind(made.hear(Tick()), TimedOut) == []
