"""All rollout workers: who samples, who holds the published weights, and who is given up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import ray

from rlhf_dist.cluster.direct_push import DirectPush, Pushed
from rlhf_dist.cluster.groups import seen
from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.relay_hosts import ONE_NODE, Relays
from rlhf_dist.cluster.relayed_loads import RelayedLoads
from rlhf_dist.cluster.standing import Standing, beat_s, is_done
from rlhf_dist.cluster.waits import fetch, limit_text
from rlhf_dist.errors import ActorLost, ActorTimeout, EngineBroken, RayLost, RlhfError, RunError, WeightSyncError
from rlhf_dist.loop.events import Event, Lost
from rlhf_dist.rollout.worker import Cancel, HandOver, Submit, Verb
from rlhf_dist.telemetry.timeline import Patience
from rlhf_dist.types import Request
from rlhf_dist.weights.receipts import Announcement, receipt_problem
from rlhf_dist.weights.shared_memory import BUFFERS

SYNC_KEY = "weights.timeout_s"
NOBODY_HOLDS = "no rollout worker holds the published weights"


class RolloutFleet:
    """A worker serves only after its receipt proved the published version.

    One that did not answer a push in time costs that wait once: later pushes are offered to it and not waited for. One
    that died, whose engine is broken, or that missed `give_up_after` pushes in a row, is killed and asked no more. So
    are all where none of them proved a version: without one the next push may never come.
    """

    def __init__(
        self,
        workers: Mapping[str, Any],
        inbox: Inbox,
        *,
        timeout_s: float,
        sync_timeout_s: float,
        give_up_after: int = 3,
        relays: Relays = ONE_NODE,
        direct: DirectPush | None = None,
        shares_gpu: bool = False,
    ) -> None:
        """`direct`: where the learner sends straight to the workers. `shares_gpu`: whether workers and learner ranks
        take turns on the same GPUs."""
        self._direct = direct
        self._shares_gpu = shares_gpu
        self._standings = {name: Standing(worker) for name, worker in workers.items()}
        # Until the first push they serve what they loaded themselves, which is all that `eval` asks of them.
        self._serving = list(workers)
        self._announced: Announcement | None = None
        self._timeout_s = timeout_s
        self._sync_timeout_s = sync_timeout_s
        self._give_up_after = give_up_after
        self._inbox = inbox
        self._relays = relays
        self._elsewhere = RelayedLoads(
            relays, inbox, self._standings, limit_s=sync_timeout_s, missed=self._missed, silence=self._silence
        )
        self._deaths: dict[str, str] = {}
        """Worker whose death, or broken engine, was noticed apart from a push -> the words for it, until it is back."""
        for name in self._standings:
            self._ask_for_events(name)

    def submit(self, worker: str, requests: Sequence[Request]) -> None:
        """See `loop.ports.Rollouts`."""
        self._post(worker, Submit(tuple(requests)))

    def cancel(self, worker: str, keys: Sequence[str]) -> None:
        """See `loop.ports.Rollouts`."""
        self._post(worker, Cancel(tuple(keys)))

    def hand_over(self, worker: str, keys: Sequence[str]) -> None:
        """See `loop.ports.Rollouts`."""
        self._post(worker, HandOver(tuple(keys)))

    def sleep(self) -> list[str]:
        """See `loop.ports.Rollouts`. Does nothing where workers have devices of their own, or share a CPU's memory."""
        if not self._shares_gpu:
            return []
        asked = dict(self._standings)
        calls = {name: one.worker.sleep.remote(one.posted) for name, one in asked.items()}
        for standing in asked.values():
            standing.posted += 1
        self._inbox.wait(list(calls.values()), Patience(self._sync_timeout_s), count=len(calls))
        problems: list[str] = []
        error: type[RunError] = RunError
        for name, call in calls.items():
            if self._standings.get(name) is not asked[name]:
                continue  # It died meanwhile, which the controller has heard of.
            try:
                self._require_asleep(name, call)
            except RayLost:
                raise
            except RlhfError as failure:
                error = ActorTimeout if isinstance(failure, ActorTimeout) else RunError
                text = str(failure)
                problems.append(self._give_up(name, text if text.startswith(name) else f"{name}: {text}"))
        if problems and not self._standings:
            raise error("; ".join(problems))
        return problems

    def _require_asleep(self, name: str, call: Any) -> None:
        if not is_done(call):
            limit = limit_text(self._sync_timeout_s, SYNC_KEY)
            raise ActorTimeout(self._silence(name, f"did not free its GPU's memory for the learner in {limit}"))
        fetch(call, name, "sleep", self._sync_timeout_s)

    def admit(self, name: str, worker: Any) -> None:
        """A worker that was started again. It serves once it has proved the published version."""
        self._standings[name] = Standing(worker, silent=True, returned=True)
        self._deaths.pop(name, None)
        self._ask_for_events(name)
        if self._announced is None:
            self._serving.append(name)

    def serving(self) -> tuple[str, ...]:
        """See `loop.ports.Rollouts`; with those whose receipt for the published version came late."""
        self._invite()
        self._take_back()
        return tuple(name for name in self._standings if name in self._serving)

    def _post(self, worker: str, verb: Verb) -> None:
        standing = self._standings.get(worker)
        if standing is not None:  # else it has been given up, which the controller will hear of
            standing.worker.post.remote(standing.posted, verb)
            standing.posted += 1

    def _ask_for_events(self, name: str) -> None:
        worker = self._standings[name].worker
        call = worker.events.remote(beat_s(len(self._standings)))
        self._inbox.expect(call, partial(self._read_events, name, worker))

    def _read_events(self, name: str, worker: Any, call: Any) -> Sequence[Event]:
        """A worker's events; one that has died, or whose engine failed, is lost."""
        standing = self._standings.get(name)
        if standing is None or standing.worker is not worker:
            return []  # It was given up before, and another process may have its name.
        try:
            events: Sequence[Event] = fetch(call, name, "generate", self._timeout_s)
        except RayLost:
            raise
        except RunError as error:
            self._end(name)
            text = str(error)
            self._deaths[name] = text if text.startswith(name) else f"{name}: {text}"
            return [Lost(name, self._deaths[name])]
        self._ask_for_events(name)
        return events

    def begin_anew(self) -> list[str]:
        """The learner is another one now; loads under way are waited for. Returns who is given up, a sentence each."""
        calls = [one.call for one in self._standings.values() if one.call is not None and not one.silent]
        if calls:
            self._inbox.wait(calls, Patience(self._sync_timeout_s), count=len(calls))
        self._serving, self._announced = [], None
        self._elsewhere.forget()
        broken = {name: why for name, one in list(self._standings.items()) if (why := one.begin_anew(name))}
        return [self._give_up(name, why) for name, why in broken.items()]

    def make_room(self) -> list[str]:
        """Give up workers that do not answer where they may hold all buffers; of those, the latest may stay.

        Returns one sentence a worker.
        """
        late = {
            name: standing
            for name, standing in self._standings.items()
            if standing.call is not None and not is_done(standing.call)
        }
        problems: list[str] = []
        for relay in ("", *self._relays.fetch):  # each node has buffers of its own
            there = {name: late[name] for name in late if self._relays.of_worker.get(name, "") == relay}
            problems += self._free_a_buffer(there)
        return problems

    def _free_a_buffer(self, late: Mapping[str, Standing]) -> list[str]:
        """The same for the late workers of one node."""
        if len({standing.offset for standing in late.values()}) < BUFFERS:
            return []
        newest = max(late.values(), key=lambda standing: standing.version)
        why = "it may hold the memory that the next version needs, as another worker holds the rest"
        return [
            self._give_up(name, f"{self._silence(name, f'still has not loaded {standing.version}')}; {why}")
            for name, standing in late.items()
            if standing.offset != newest.offset
        ]

    def load_weights(self, announcement: Announcement) -> list[str]:
        """Push to every worker that is left; those with a wrong or missing receipt do not serve.

        Returns what was wrong, one sentence a worker. Where nobody holds the version, all are given up, and whoever
        comes back is asked to load it. Raises `WeightSyncError` where the learner sends it to them itself.
        """
        problems: list[str] = []
        before, pushed = set(self._standings), Pushed()
        for name, standing in list(self._standings.items()):
            if standing.call is not None:
                problems += self._look_back(name, standing, announcement.version)
        self._serving, self._announced = [], announcement
        patience = Patience(self._sync_timeout_s)
        if self._direct is not None:
            pushed = self._direct.load(self._standings, announcement, self._inbox.wait)
            problems = [*filter(None, [pushed.problem]), *problems]
        else:
            for name, standing in self._standings.items():
                if name not in self._relays.of_worker:
                    standing.ask_to_load(announcement)
            problems += self._elsewhere.load(announcement, patience)
        asked = {name: one for name, one in self._standings.items() if one.version == announcement.version}
        taking_part = [one for name, one in asked.items() if name not in pushed.left_out]
        awaited = [one.call for one in taking_part if not one.silent] or [one.call for one in taking_part]
        if awaited:
            self._inbox.wait(awaited, patience, count=len(awaited))
        for name, standing in asked.items():
            if self._standings.get(name) is standing:  # else it was lost, and another one may have its name by now
                problems += self._read_receipt(name, standing, announcement, pushed.left_out.get(name, ""))
        if self._standings and not self._serving and not any(one.is_coming for one in self._standings.values()):
            if self._direct is not None:  # most likely nothing is wrong with the workers
                deaths = [why for name, why in self._deaths.items() if name in before]
                raise WeightSyncError("; ".join([*deaths, *problems, NOBODY_HOLDS]))
            return self._give_up_all(problems)
        return problems

    def _invite(self) -> None:
        """Ask those that have come back to load the published version, from where their node has it.

        A learner that sends straight to them sends again: no step goes on meanwhile.
        """
        fresh = {name: one for name, one in self._standings.items() if one.version < 0 and one.call is None}
        if self._announced is None or not fresh:
            return
        if self._direct is not None:
            self._direct.load(fresh, self._announced, self._inbox.wait)
            return
        for name, standing in fresh.items():
            if name in self._relays.of_worker:
                self._elsewhere.invite(name, self._announced)
            else:
                standing.ask_to_load(self._announced)

    def _take_back(self) -> None:
        """Let those serve whose receipt for the present version came late; nobody is waited for.

        One that has come back and cannot prove it is lost again: the next push may never come without it.
        """
        for name, standing in list(self._standings.items()):
            found = self._announced
            late = standing.call is not None and found is not None and standing.version == found.version
            if found is None or not late or not is_done(standing.call):
                continue
            try:
                problem = receipt_problem(found, fetch(standing.call, name, "load_weights", self._sync_timeout_s))
                why = "" if problem is None else problem.text
            except RayLost:
                raise
            except RlhfError as error:
                why = str(error)
            if not why:
                self._proved(name, standing)
            elif standing.returned:
                self._end(name)
                self._inbox.put(Lost(name, why if why.startswith(name) else f"{name}: {why}"))
            # else the next push looks at it again, and tells

    def _look_back(self, name: str, standing: Standing, version: int) -> list[str]:
        """Before the push of `version`: what became of an earlier call, whose answer was not waited for.

        While it is not answered there is no other: calls must not pile up, and a stopped process would answer them all.
        """
        if not is_done(standing.call):
            return self._missed(
                name, standing, version, self._silence(name, f"still has not loaded {standing.version}")
            )
        call, standing.call = standing.call, None
        problem = f"{name} loaded version {standing.version} too late"
        try:
            fetch(call, name, "load_weights", self._sync_timeout_s)
        except ActorLost as error:
            return [self._give_up(name, str(error))]
        except EngineBroken as error:
            return [self._give_up(name, f"{name}: {error}")]
        except RlhfError as error:
            problem = f"{name}: {error}"
        return self._missed(name, standing, standing.version, problem)

    def _read_receipt(self, name: str, standing: Standing, announcement: Announcement, left_out: str) -> list[str]:
        """Let the worker serve when its receipt is right; returns what is wrong with it otherwise.

        `left_out`: why the others went on without it, if they did.
        """
        version = announcement.version
        if not is_done(standing.call):
            if standing.silent:
                return []  # It may still come, and is counted at the next push.
            standing.silent = True
            limit = limit_text(self._sync_timeout_s, SYNC_KEY)
            what = f"did not load version {version} in {limit}"
            if left_out:
                what = f"was left out of the push of version {version} ({left_out})"
            return self._missed(name, standing, version, self._silence(name, what))
        call, standing.call = standing.call, None
        try:
            problem = receipt_problem(announcement, fetch(call, name, "load_weights", self._sync_timeout_s))
        except ActorLost as error:
            return [self._give_up(name, str(error))]
        except EngineBroken as error:
            return [self._give_up(name, f"{name}: {error}")]
        except RlhfError as error:
            return self._missed(name, standing, version, f"{name}: {error}")
        if problem is None:
            self._proved(name, standing)
            return []
        if problem.broken:
            return [self._give_up(name, problem.text)]
        return self._missed(name, standing, version, problem.text)

    def _proved(self, name: str, standing: Standing) -> None:
        standing.call, standing.missed, standing.silent, standing.returned = None, 0, False, False
        standing.proved = self._announced
        self._serving.append(name)

    def _silence(self, name: str, what: str) -> str:
        return self._inbox.told(f"{name} {what}{seen(name)}", [name])

    def _missed(self, name: str, standing: Standing, version: int, problem: str) -> list[str]:
        standing.proved, standing.problem = None, problem
        if version <= standing.last_missed:
            return []
        standing.missed, standing.last_missed = standing.missed + 1, version
        if standing.missed >= self._give_up_after:
            return [self._give_up(name, f"{problem}; it missed {standing.missed} pushes in a row")]
        waits = " and is not waited for" if standing.silent else ""
        return [f"{problem}; it serves no tokens{waits} until a push succeeds"]

    def _give_up_all(self, problems: Sequence[str]) -> list[str]:
        """No worker that is left proved the version. `problems`: of this push; returns what is told instead of them."""
        missed = {name: one.problem or f"{name} has no weights" for name, one in self._standings.items()}
        others = [text for text in problems if not text.startswith(tuple(missed.values()))]
        return others + [self._give_up(name, f"{why}; {NOBODY_HOLDS}") for name, why in missed.items()]

    def _end(self, name: str) -> None:
        ray.kill(self._standings.pop(name).worker)
        self._serving = [other for other in self._serving if other != name]

    def _give_up(self, name: str, problem: str) -> str:
        """End a worker: it is neither asked nor waited for any more."""
        self._end(name)
        left = len(self._standings)
        why = f"{problem}; it is given up, {left} rollout worker{'s are' if left != 1 else ' is'} left"
        self._inbox.put(Lost(name, why, told=True))
        return why
