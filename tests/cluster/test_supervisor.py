"""The supervisor with light actors in a real Ray: who dies or is stopped is found, and started again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_dist.cluster import roster as rosters
from rlhf_dist.cluster.groups import LearnerGroup
from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.roster import Alive, Roster, work
from rlhf_dist.cluster.session import reserve
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.cluster.supervisor import Supervisor
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import RanksSilent
from rlhf_dist.loop.events import Event, Lost, NotStarted, Pulse, Returned
from rlhf_dist.loop.healing import Healing

LIMIT_S = 60.0


def light() -> type[Alive]:
    """A process that starts at once. Made in a function, so that Ray sends it: it finds no test module."""

    class Light(Alive):
        def __init__(self, spec: ActorSpec) -> None:
            enter(spec)
            if Path(spec.log).with_name("refuse").exists():
                raise RuntimeError("there is no memory left")

        def ready(self) -> int:
            return os.getpid()

        def busy(self, seconds: float) -> None:
            time.sleep(seconds)

        @work
        def update(self, micro_batches: int, seconds: float) -> None:
            for self.done in range(1, micro_batches + 1):
                time.sleep(0.5)
            time.sleep(seconds)

        def counts(self) -> dict[str, int]:
            return {"micro_batches": getattr(self, "done", 0)}

    return Light


class Watched:
    """One process under a supervisor, and all that is heard of it."""

    def __init__(self, group: Any, folder: Path) -> None:
        self.roster, self.inbox, self.heard = Roster(group), Inbox(), list[Event]()
        self.folder = folder
        spec = ActorSpec("it 0", Config(), "", "cpu", 1, str(folder / "it-0.log"), 0, str(folder))
        (self.name,) = self.roster.start_servers(light(), [spec], 1, [0])
        self.pid = self.ask()
        self.admitted: list[Any] = []
        self.inbox.listen(self.heard.extend)
        admits = {self.name: [lambda _, actor: self.admitted.append(actor)]}
        self.supervisor = Supervisor(self.roster, self.inbox, admits, start_s=LIMIT_S)

    def ask(self) -> int:
        """The id of the process that there is now."""
        return ray.get(self.roster.actors[self.name].ready.remote(), timeout=LIMIT_S)

    def hear(self, kind: type[Event], count: int = 1) -> float:
        """Wait until so many of a kind have been heard; the seconds that it took."""
        began = time.monotonic()
        while sum(isinstance(event, kind) for event in self.heard) < count:
            assert time.monotonic() - began < LIMIT_S, self.heard
            self.inbox.pump()
        return time.monotonic() - began


@pytest.fixture
def watched(local_ray: None, tmp_path: Path) -> Iterator[Watched]:
    with reserve([{"CPU": 0.01, "GPU": 0.0}], LIMIT_S) as group:
        yield Watched(group, tmp_path)


def test_one_that_is_killed_is_found_at_once_whatever_it_does_and_comes_back_as_another(watched: Watched) -> None:
    watched.hear(Pulse, 2)
    watched.roster.actors[watched.name].busy.remote(LIMIT_S)
    os.kill(watched.pid, signal.SIGKILL)
    assert watched.hear(Lost) < 2.0, "milliseconds, on a quiet machine"
    (lost,) = [event for event in watched.heard if isinstance(event, Lost)]
    assert lost.member == "it 0" and lost.why.startswith("it 0 died: killed by SIGKILL")
    watched.supervisor.respawn(watched.name)
    watched.hear(Returned)
    assert watched.admitted == [watched.roster.actors[watched.name]] and watched.ask() != watched.pid
    count = sum(isinstance(event, Pulse) for event in watched.heard)
    watched.hear(Pulse, count + 2)
    assert sum(isinstance(event, Lost) for event in watched.heard) == 1


def test_one_that_is_stopped_gives_no_sign_and_is_ended_when_it_is_replaced(watched: Watched) -> None:
    watched.hear(Pulse, 2)
    os.kill(watched.pid, signal.SIGSTOP)
    time.sleep(2 * 1.0 + 0.5)
    watched.inbox.pump()
    watched.heard.clear()
    for _ in range(3):
        watched.inbox.pump()
    assert watched.heard == []
    watched.supervisor.respawn(watched.name)
    watched.hear(Returned)
    assert not any(isinstance(event, Lost) for event in watched.heard), "what is heard of the one before counts no more"
    assert watched.ask() != watched.pid
    end = time.monotonic() + LIMIT_S
    while Path(f"/proc/{watched.pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{watched.pid}").exists()


def test_one_that_lives_has_more_time_while_it_goes_on_and_is_found_when_it_does_not(watched: Watched) -> None:
    """It works for longer than its limit, and then does nothing any more."""
    name, now = watched.name, watched.inbox.now
    healing = Healing({name: "learner"}, respawns=1, window_s=1e9, pulse_s=1e9, start_s=1e9)

    def listen(events: Sequence[Event]) -> None:
        for one in events:
            assert isinstance(one, Pulse)
            healing.pulse(name, now(), one.activity)

    watched.inbox.listen(listen)
    ranks = LearnerGroup(
        watched.roster.actors,
        timeout_s=2.0,
        waits=watched.inbox.wait,
        quiet_s=lambda names: healing.quiet_s(names, now()),
    )
    began = time.monotonic()
    with pytest.raises(RanksSilent, match=r"^it 0 made no progress in 'update' for 2 s \(learner.timeout_s\)") as found:
        ranks.call("update", 6, LIMIT_S)
    assert 3.0 + 2.0 - 1.1 < time.monotonic() - began < LIMIT_S
    assert found.value.silent == (name,)
    facts = healing.progress(now())[name]
    assert (facts["phase"], facts["counts"]) == ("update", {"micro_batches": 6})
    assert facts["phase_s"] > facts["without_progress_s"] > 1.0 and facts["without_sign_s"] < LIMIT_S


def test_one_that_cannot_start_says_why(watched: Watched) -> None:
    (watched.folder / "refuse").touch()
    watched.supervisor.respawn(watched.name)
    watched.hear(NotStarted)
    (failed,) = [event for event in watched.heard if isinstance(event, NotStarted)]
    assert failed.member == "it 0" and "there is no memory left" in failed.why
    (watched.folder / "refuse").unlink()
    watched.supervisor.respawn(watched.name)
    watched.hear(Returned)


def test_the_thread_that_answers_for_a_process_is_its_own() -> None:
    assert getattr(Alive.pulse, "__ray_concurrency_group__", None) == rosters.HEALTH
