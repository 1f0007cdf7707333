"""Ranks that are started again together, with light actors in a real Ray, and what the fleet makes of it."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import cluster_stand_ins
import pytest
from cluster_stand_ins import ANNOUNCEMENT, Ears, fleet, serve, tell

from rlhf_dist.cluster.groups import PolicyGroup
from rlhf_dist.cluster.processes import ENDED, stat
from rlhf_dist.cluster.rank_rebuild import RankRebuild, background_of, kept_state
from rlhf_dist.cluster.roster import Alive, Roster
from rlhf_dist.cluster.session import reserve
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.cluster.supervisor import Supervisor
from rlhf_dist.config.schema import Config, LearnerConfig
from rlhf_dist.errors import RanksLost, RanksSilent, ResourceError
from rlhf_dist.loop.events import Lost, Pulse
from rlhf_dist.loop.kept_state import KeptState
from rlhf_dist.planning.placement import Machine, place
from rlhf_dist.weights import shared_memory

workers = cluster_stand_ins.workers
LIMIT_S = 60.0
NAMES = ("learner rank 0", "learner rank 1")


def light() -> type[Alive]:
    """A rank that joins at once. Made in a function, so that Ray sends it: it finds no test module."""

    class Light(Alive):
        def __init__(self, spec: ActorSpec) -> None:
            enter(spec)
            self._spec = spec
            self._joined: Any = None

        def address(self, nodes: int) -> tuple[str, int]:
            if Path(self._spec.log).with_name("refuse").exists():
                os._exit(3)
            return "here", nodes

        def join(self, address: str, port: int, resume: str | None, spread: bool) -> str:
            self._joined = [os.getpid(), address, port, resume, spread, self._spec.source]
            return self._spec.name

        def update(self, seconds: float) -> Any:
            time.sleep(seconds)
            return self._joined

    return Light


class Ranks:
    """Two ranks of a learner under a supervisor, a fleet, and all that is heard."""

    def __init__(self, group: Any, folder: Path, workers: dict[str, Any]) -> None:
        self.ears, self.roster, config = Ears(), Roster(group), Config()
        logs = [str(folder / f"{name.replace(' ', '-')}.log") for name in NAMES]
        specs = [
            ActorSpec(name, config, "as it began", "cpu", 1, log, rank, str(folder))
            for rank, (name, log) in enumerate(zip(NAMES, logs, strict=True))
        ]
        ranks = self.roster.start_all(light(), specs, 0, 0.0, 0.0)
        self.policy = PolicyGroup(ranks, timeout_s=LIMIT_S, waits=self.ears.inbox.wait)
        self.policy.call("join", "first", 1, None, False)
        admits = {name: [self.policy.admit] for name in NAMES}
        self.rollouts = fleet(workers, self.ears)
        supervisor = Supervisor(self.roster, self.ears.inbox, admits, start_s=LIMIT_S)
        self.rebuild = RankRebuild(
            config,
            place(config, Machine(cpus=8, gpus=0), "train"),
            "as it began",
            roster=self.roster,
            supervisor=supervisor,
            rollouts=self.rollouts,
            inbox=self.ears.inbox,
            ranks=NAMES,
            critics=(),
        )

    def joined(self) -> list[Any]:
        return list(self.policy.call("update", 0.0).values())

    def pids(self, folder: Path) -> list[int]:
        return [json.loads((folder / f"{name.replace(' ', '-')}.pid").read_text())["pid"] for name in NAMES]


@pytest.fixture
def ranks(local_ray: None, tmp_path: Path, workers: dict[str, Any]) -> Iterator[Ranks]:
    with reserve([{"CPU": 0.01, "GPU": 0.0}] * 2, LIMIT_S) as group:
        yield Ranks(group, tmp_path, workers)


def test_all_ranks_are_other_processes_afterwards_that_have_what_the_folder_holds(ranks: Ranks, tmp_path: Path) -> None:
    before = ranks.pids(tmp_path)
    os.kill(before[0], signal.SIGSTOP)
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(RanksLost, match="learner rank 1 died during 'update': killed by SIGKILL"):
        ranks.joined()
    assert ranks.rebuild.rebuild(tmp_path / "step-4") == []
    found = ranks.joined()
    after = [one[0] for one in found]
    assert after == ranks.pids(tmp_path) and not set(after) & set(before)
    assert all((known := stat(pid)) is None or known.state in ENDED for pid in before), "the stopped one, too"
    resumed = [str(tmp_path / "step-4"), False, str(tmp_path / "step-4" / "hf")]
    assert [one[1:] for one in found] == [["here", 1, *resumed]] * 2
    ranks.rebuild.rebuild(None)
    assert [one[3:] for one in ranks.joined()] == [[None, False, "as it began"]] * 2


def test_those_that_are_back_are_watched_and_those_before_are_heard_of_no_more(ranks: Ranks, tmp_path: Path) -> None:
    ranks.rebuild.rebuild(None)
    ranks.ears.heard.clear()
    ranks.ears.hear(Pulse, 6)
    assert ranks.ears.of(Lost) == []
    os.kill(ranks.pids(tmp_path)[1], signal.SIGKILL)
    (lost,) = ranks.ears.hear(Lost, 1)
    assert lost.member == NAMES[1]


def test_one_that_dies_while_they_meet_is_lost_again(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with pytest.raises(RanksLost, match="learner rank 0 died during 'give its address'"):
        ranks.rebuild.rebuild(None)
    (tmp_path / "refuse").unlink()
    ranks.rebuild.rebuild(None)
    assert len(ranks.joined()) == 2


def test_ranks_that_do_not_answer_in_time_are_told_from_other_processes(ranks: Ranks) -> None:
    slow = PolicyGroup(ranks.roster.actors, timeout_s=0.5, waits=ranks.ears.inbox.wait)
    with pytest.raises(RanksSilent, match=r"did not finish 'update' in 0\.5 s \(learner\.timeout_s\)"):
        slow.call("update", 2.0)


def test_after_it_a_lower_version_is_pushed_and_missed_like_any_other(workers: dict[str, Any]) -> None:
    ears = Ears()
    rollouts = fleet(workers, ears)
    tell(workers["two"], "torn")
    assert len(rollouts.load_weights(replace(ANNOUNCEMENT, version=5))) == 1
    assert rollouts.begin_anew() == []
    (problem,) = rollouts.load_weights(replace(ANNOUNCEMENT, version=2, hashes=("other",)))
    assert problem.startswith("two: version 3: bucket 0 arrived torn"), "it is told though 5 was missed before"
    assert rollouts.serving() == ("one",)
    tell(workers["two"], "right")
    assert rollouts.load_weights(replace(ANNOUNCEMENT, version=3, hashes=("third",))) == []
    assert serve(rollouts, ears) == {"one", "two"}


def test_a_load_that_is_under_way_is_waited_for_and_counts_for_nothing(workers: dict[str, Any]) -> None:
    """The push is left in its middle, as by the loss of a rank."""
    ears = Ears()
    rollouts = fleet(workers, ears)
    tell(workers["two"], "sleeps")
    inbox: Any = ears.inbox
    wait = inbox.wait

    def leave(*_: Any, **__: Any) -> None:
        raise RanksLost("learner rank 0 died")

    inbox.wait = leave
    with pytest.raises(RanksLost):
        rollouts.load_weights(replace(ANNOUNCEMENT, version=4))
    inbox.wait = wait
    assert rollouts.begin_anew() == []
    tell(workers["two"], "right")
    assert rollouts.load_weights(replace(ANNOUNCEMENT, version=4, hashes=("other",))) == []
    assert serve(rollouts, ears) == {"one", "two"}


@pytest.mark.parametrize(
    ("nodes", "rank_nodes", "told"),
    [
        ([""], (), ""),
        (["a", "b"], ("a", "a"), ""),
        (["a", "b"], ("a", "b"), "ranks are on b; set it to 0"),
        (["a", "b"], (), "ranks are on a node that Ray chooses; set it to 0"),
    ],
)
def test_ranks_elsewhere_are_rejected(
    nodes: list[str], rank_nodes: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "SHARED_MEMORY", tmp_path)
    config = Config(learner=LearnerConfig(keep_state_every=2))
    machines = [Machine(cpus=8, gpus=0, address=node) for node in nodes]
    placement = replace(place(config, machines[0], "train"), rank_nodes=rank_nodes)
    notes: list[str] = []
    with ExitStack() as stack:
        writer = background_of(config, "train", machines, placement, str(tmp_path), Any, stack, notes.append)
        if not told:
            assert isinstance(kept_state(config, machines, placement, str(tmp_path), stack), KeptState)
            assert writer is not None and notes == [] and writer.begin(1).is_relative_to(tmp_path)
            stack.close()
            assert list(tmp_path.iterdir()) == [], "nothing is left in shared memory"
            return
        why = told.partition(";")[0].removeprefix("ranks are ")
        assert writer is None and notes == [f"training waits while a checkpoint is written, since its ranks are {why}"]
        with pytest.raises(ResourceError, match=told):
            kept_state(config, machines, placement, str(tmp_path), stack)
