"""What follows from the loss of a process: who is started again, how often, and what becomes of its work."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest
from hand_made import FewPrompts, Rig, compared_and_kept, given, head_of, of_kind, rules_with, scores_of

from rlhf_dist.errors import ActorLost, ActorTimeout
from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.events import (
    NOBODY,
    Command,
    Compare,
    Kept,
    Limit,
    Lost,
    MemberKind,
    NotStarted,
    Pulse,
    Rebuild,
    Respawn,
    Returned,
    Score,
    Scored,
    Serving,
    Tell,
    Tick,
    TimedOut,
    Undone,
)
from rlhf_dist.loop.healing import RULES, Healing
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.shell import Actors, Shell
from rlhf_dist.types import Answered, Handle

KINDS: dict[str, MemberKind] = {
    "a": "rollout",
    "b": "rollout",
    "s": "scoring",
    "r": "reference",
    "collator": "collator",
    "rank": "learner",
    "copier": "relay",
}


def healing(respawns: int = 2, unique: tuple[str, ...] = ()) -> Healing:
    return Healing(KINDS, respawns=respawns, window_s=100.0, pulse_s=15.0, start_s=50.0, unique=unique)


def rig(workers: str = "ab", **rules: object) -> Rig:
    """Everybody is watched, and has shown a sign of life."""
    made = Rig(rules_with(**rules), workers=workers, healing=healing())
    for name in KINDS:
        made.hear(Pulse(name))
    return made


def late(commands: list[Command], limit: Limit) -> list[tuple[str, bool]]:
    """(who is late with this, whether the run ends)."""
    return [(one.member, one.ends) for one in of_kind(commands, TimedOut) if one.limit == limit]


def test_there_is_a_rule_for_every_kind() -> None:
    assert {kind for kind, phase in RULES if phase == "any"} == set(get_args(MemberKind))


def test_one_whose_state_nobody_else_has_ends_the_run_whatever_its_kind_allows() -> None:
    for name in ("r", "s", "rank"):
        assert healing().heals(name) and not healing(unique=(name,)).heals(name)


def test_a_process_that_is_never_given_work_is_started_again_and_nothing_else_follows() -> None:
    made = rig()
    commands = made.hear(Lost("copier", "copier died"))
    assert commands == [Respawn("copier"), Tell("warning", "copier died; copier is started again")]
    assert made.hear(Returned("copier")) == [Tell("returned", "copier is ready again")]
    assert made.hear(Returned("copier")) == [] == made.hear(Tick())


def test_a_lost_worker_is_started_again_and_serves_once_it_has_proved_the_weights() -> None:
    made = rig("a")
    commands = made.hear(Lost("a", "a died"))
    assert of_kind(commands, Respawn) == [Respawn("a")]
    (told,) = of_kind(commands, Tell)
    assert told.message == "a died; 1 request of a begin again; a is started again"
    assert given(made.hear(Serving(()))) == []
    assert given(made.hear(Returned("a"))) == [], "it has proved nothing yet"
    assert given(made.hear(Serving(("a",)))) == [("a", "train/0/0/1")]


def test_a_loss_that_is_told_twice_counts_once() -> None:
    made = rig()
    for version in (1, 2, 3):
        assert len(of_kind(made.hear(Lost("a", "a died")), Respawn)) == 1
        assert of_kind(made.hear(Lost("a", "its events ended")), Respawn) == []
        made.hear(Returned("a"))
        made.now += 60.0
        made.publish(version)


def test_one_that_is_lost_too_often_ends_the_run_with_what_was_tried() -> None:
    made = rig()
    made.hear(Lost("a", "a was killed"))
    made.hear(Returned("a"))
    made.now = 40.0
    made.hear(Lost("a", "a broke"))
    made.now = 50.0
    with pytest.raises(ActorLost, match=re.escape("a was lost 3 times within 100 s (faults.window_s)")) as caught:
        made.hear(NotStarted("a", "a has no memory"))
    assert "at most 2 times (faults.respawns)" in str(caught.value)
    assert "50 s ago: a was killed; 10 s ago: a broke; 0 s ago: a has no memory" in str(caught.value)


def test_losses_beyond_the_window_do_not_count() -> None:
    made = rig()
    for version in (1, 2, 3, 4, 5):
        assert of_kind(made.hear(Lost("a", "a died")), Respawn) == [Respawn("a")]
        made.hear(Returned("a"))
        made.now += 50.1
        made.publish(version)


def test_who_holds_what_nobody_else_has_ends_the_run() -> None:
    with pytest.raises(ActorLost, match="collator died"):
        rig().hear(Lost("collator", "collator died"))


def test_a_lost_rank_has_all_of_them_started_again_and_who_does_it_tells() -> None:
    assert rig().hear(Lost("rank", "rank died")) == [Rebuild("rank died")]


def test_ranks_are_counted_together_and_each_is_waited_for() -> None:
    found = Healing({"one": "learner", "two": "critic"}, respawns=2, window_s=100.0, pulse_s=15.0, start_s=50.0)
    members = rig().members
    for now in (0.0, 10.0):
        for name in found.ranks:
            found.pulse(name, now)
        found.rebuild(f"{now:g}", now)
        found.pulse("one", now)
        assert not found.watches("one"), "a late sign of the rank before"
        for name in found.ranks:
            assert found.returned(name, now)
    found.published(1)
    found.rebuild("20", 110.0)
    assert late(found.overdue(160.1, members, []), "start") == [("one", False), ("two", False)]
    with pytest.raises(ActorLost, match=re.escape("the learner was lost 3 times within 100 s (faults.window_s)")):
        found.rebuild("30", 110.0)


def test_a_rank_whose_engines_hold_a_state_of_their_own_ends_the_run() -> None:
    made = Rig(rules_with(), healing=healing(unique=("rank",)))
    made.hear(Pulse("rank"))
    with pytest.raises(ActorLost, match="rank died"):
        made.hear(Lost("rank", "rank died"))


def test_a_reference_that_moves_cannot_begin_where_the_run_began() -> None:
    made = Rig(rules_with(compares=True), healing=healing(unique=("r",)))
    with pytest.raises(ActorLost, match="r died"):
        made.hear(Lost("r", "r died"))


def test_a_lost_server_loses_nothing_and_what_it_had_waits_for_it() -> None:
    made = rig(groups_per_step=2, compares=True)
    made.answer("train/0/0/0")
    made.hear(Kept("train/0/0/0"))
    commands = made.hear(Lost("s", "s died"))
    assert of_kind(commands, Respawn) == [Respawn("s")] and of_kind(commands, Score) == []
    assert of_kind(made.answer("train/0/1/0"), Score) == [], "no other server is there"
    made.hear(Kept("train/0/1/0"))
    scores = of_kind(made.hear(Returned("s")), Score)
    assert [(one.server, one.key) for one in scores] == [("s", "train/0/0/0"), ("s", "train/0/1/0")]
    for key in ("train/0/0/0", "train/0/1/0"):
        for event in compared_and_kept(key):
            made.hear(event)
        made.hear(Scored("s", key, scores_of((0.0, 1.0))))
    assert made.taken() == ["0/0", "0/1"]


def test_what_a_lost_server_has_answered_is_not_asked_for_again() -> None:
    made = rig(compares=True)
    made.answer("train/0/0/0")
    made.hear(Scored("s", "train/0/0/0", scores_of((0.0, 1.0))))
    made.hear(Lost("s", "s died"))
    assert of_kind(made.hear(Returned("s")), Score) == []
    made.hear(Lost("r", "r died"))
    (again,) = of_kind(made.hear(Returned("r")), Compare)
    assert again.key == "train/0/0/0"


def test_tokens_of_an_earlier_process_of_that_name_are_not_waited_for() -> None:
    """The worker is lost and comes back, and then a server says that it could not get at the tokens."""
    made = rig("a")
    made.answer("train/0/0/0")
    made.hear(Kept("train/0/0/0"))
    made.hear(Lost("a", "a died"))
    made.hear(Returned("a"))
    made.hear(Serving(("a",)))
    assert given(made.hear(Undone("scoring", "s", "train/0/0/0"))) == [("a", "train/0/0/1")]


def test_no_sign_of_life_is_found_whatever_a_process_does() -> None:
    made = rig()
    made.now = 15.0
    made.hear(Pulse("a"))
    assert late(made.hear(Tick()), "pulse") == []
    made.now = 15.1
    expected = [(name, RULES[kind, "any"] == "end") for name, kind in KINDS.items() if name != "a"]
    assert late(made.hear(Tick()), "pulse") == expected


def test_one_that_starts_has_the_limit_of_a_start_and_no_other() -> None:
    made = rig("a")
    made.hear(Lost("a", "a died"))
    made.hear(Serving(()))
    made.now = 49.0
    for name in KINDS:
        made.hear(Pulse(name))  # of `a`: a late one of the process that was lost
    found = made.hear(Tick())
    assert late(found, "pulse") == late(found, "start") == []
    assert NOBODY not in [one.member for one in of_kind(found, TimedOut)], "a worker is on its way"
    made.now = 50.1
    assert late(made.hear(Tick()), "start") == [("a", False)]


def test_a_worker_that_makes_no_progress_is_lost_and_not_the_end() -> None:
    made = rig("a")
    made.now = 14.0
    assert late(made.hear(Tick()), "work") == [("a", False)]


def test_what_a_server_has_had_for_long_is_given_to_an_idle_one_too() -> None:
    limits: dict[MemberKind, float] = dict.fromkeys(get_args(MemberKind), 1000.0)
    rules = rules_with(hedge_s=30.0, groups_per_step=2)
    servers = Members("a", ["s", "t"], [], capacity=100, limits_s=limits, beat_s=0.0)
    controller = Controller(rules, FewPrompts(), servers)
    controller.handle(Serving(("a",)), 0.0)
    for key in ("train/0/0/0", "train/0/1/0"):
        controller.handle(Answered(key, head_of(key, (3, 4), 0), Handle(key)), 0.0)
        controller.handle(Kept(key), 0.0)
    assert of_kind(controller.handle(Tick(), 40.0), Score) == [], "both are busy"
    controller.handle(Scored("t", "train/0/1/0", scores_of((0.0, 1.0))), 41.0)
    commands = controller.handle(Tick(), 41.0)
    assert [(one.server, one.key) for one in of_kind(commands, Score)] == [("t", "train/0/0/0")]
    (told,) = of_kind(commands, Tell)
    assert told.message == "train/0/0/0 has waited 41 s for a scoring server, and another one is asked, too"
    assert of_kind(controller.handle(Tick(), 100.0), Score) == [], "no third one is there"
    controller.handle(Scored("t", "train/0/0/0", scores_of((0.0, 1.0))), 101.0)
    controller.handle(Scored("s", "train/0/0/0", scores_of((0.5, 0.5))), 102.0)
    taken, _ = controller.take(103.0)
    assert taken is not None and taken.experiences[0].scores.total.tolist() == [0.0, 1.0], "the first answer counts"


def test_without_hedging_nobody_is_asked_twice() -> None:
    made = rig(groups_per_step=1)
    made.answer("train/0/0/0")
    made.now = 14.0
    assert of_kind(made.hear(Tick()), Score) == []


def test_losses_far_apart_that_no_new_step_came_between_end_the_run() -> None:
    """Each takes as long as a start or a call may, so that the window never has many."""
    made = rig("ab")
    for _ in range(2):
        made.hear(Lost("a", "a did not go on"))
        made.hear(Returned("a"))
        made.now += 101.0
    with pytest.raises(ActorLost, match=re.escape("a was lost 3 times since the last new step, and is started again")):
        made.hear(Lost("a", "a did not go on"))


def test_a_new_step_begins_the_count_anew_and_an_old_one_again_does_not() -> None:
    made = rig("ab")
    made.publish(3)
    for version in (4, 5, 6, 7):
        made.hear(Lost("a", "a died"))
        made.hear(Returned("a"))
        made.now += 101.0
        made.publish(version)
    for _ in range(2):
        made.hear(Lost("a", "a died"))
        made.hear(Returned("a"))
        made.now += 101.0
        made.publish(7)  # after ranks were started again from step 6, say
    with pytest.raises(ActorLost, match="since the last new step"):
        made.hear(Lost("a", "a died"))


class Started:
    """Ports of a shell that do nothing, but for what they are told to start."""

    def __init__(self, made: Rig) -> None:
        self._made = made
        self.started: list[str] = []

    def now(self) -> float:
        return self._made.now

    def respawn(self, member: str) -> None:
        self.started.append(member)

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_a_start_that_takes_too_long_is_tried_again_and_in_the_end_told() -> None:
    made, told = rig("a"), list[str]()
    ports: Any = Started(made)
    late = lambda one: ActorTimeout(f"{one.member} was not ready in {one.limit_s:g} s")  # noqa: E731
    actors = Actors(ports, ports, None, ports, ports, late, ports)
    shell = Shell(made.controller, actors, tell=lambda line: told.append(line.message))
    shell.hear([Lost("a", "a died"), Serving(())])
    for count in (2, 3):
        made.now += 50.1
        for name in KINDS:
            made.hear(Pulse(name))
        if count == 3:
            with pytest.raises(ActorLost, match="a was lost 3 times"):
                shell.hear([])
            break
        shell.hear([])
        assert ports.started == ["a", "a"]
        assert told[-1] == "a was not ready in 50 s; a is started again"


@pytest.mark.parametrize("others", [True, False])
def test_one_whose_node_is_gone_is_waited_for_as_long_as_others_work(others: bool) -> None:
    found = Healing({"a": "rollout", "b": "rollout"}, respawns=1, window_s=100.0, pulse_s=1e9, start_s=50.0)
    members = rig("ab").members
    found.pulse("a", 0.0)
    if others:
        found.pulse("b", 0.0)
    found.lost("a", "a died", 0.0)
    (told,) = found.not_started("a", "a waits for its node", 1.0, away=True)
    assert isinstance(told, Tell) and told.message.endswith("; the run goes on without it") == others
    assert late(found.overdue(52.0, members, ()), "start") == ([] if others else [("a", False)])
    assert found.returned("a", 1000.0) and found.watches("a"), "it is taken back when the node is"
