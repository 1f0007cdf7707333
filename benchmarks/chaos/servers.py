"""Simulated scoring servers, reference servers and the collator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from chaos.clock import Broken
from chaos.disk import Disk
from chaos.plan import COLLATOR, Fault
from chaos.truth import Body, Logprobs, Sampled, digest, number
from chaos.world import World
from rlhf_dist.errors import ActorLost, ActorTimeout
from rlhf_dist.learner.shard import Shard
from rlhf_dist.loop.events import Compared, Event, Kept, Lost, MemberKind, ReferenceKept, Scored, Undone
from rlhf_dist.loop.ports import Estimates
from rlhf_dist.types import Group as Tokens, Handle, Partial, PartialLost, Referenced, ReferenceHead
from rlhf_dist.weights.receipts import Announcement

REFERENCE_FILE = "reference/config.json"
CALL_LIMIT_S = 40.0
"""Of a call that is waited for."""
FAR, FAR_KL = "far", 1e4
"""A reference's answer that no step may learn from; nats."""
HUSH_S = 0.5
"""From the death of a server that has just answered to the word of it."""


class Server:
    """A process with a queue: it does one after the other."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self._world = name, world
        self.dead = self.silent = self.alive = False
        """`alive`: it gives signs of life although it is silent."""
        self.made: list[Logprobs] = []
        self._free_at = 0.0

    @property
    def works(self) -> bool:
        return not (self.dead or self.silent)

    def die(self) -> None:
        """What it has computed is lost with it."""
        self.dead = True
        for logprobs in self.made:
            logprobs.lost = True

    def done_after(self, seconds: float) -> float:
        """How long from now until it has done this, too."""
        now = self._world.clock.now
        self._free_at = max(self._free_at, now) + seconds
        return self._free_at - now


class Group:
    """Servers by name. When one dies, the run is told."""

    def __init__(self, names: Sequence[str], world: World) -> None:
        self._world = world
        self.servers = {name: Server(name, world) for name in names}
        world.plan_strikes("die", names, self._die)
        world.plan_strikes("wedge", names, self._fall_silent)
        world.plan_strikes("stall", names, self._fall_silent)
        world.plan_strikes("cut", names, lambda _: None)

    def begin(self, name: str) -> None:
        """A process of this name is there."""
        self.servers[name] = Server(name, self._world)

    def end(self, name: str) -> None:
        """It is killed."""
        self.servers[name].die()

    def gives_signs(self, name: str) -> bool:
        """Whether a process of this name shows that it lives."""
        server = self.servers[name]
        return not server.dead and (server.alive or not server.silent)

    def tell_of_death(self, server: Server) -> None:
        """Unless another has its name by now."""
        if self.servers[server.name] is server:
            self._world.tell(server.name, Lost(server.name, f"{server.name} died"), "deaths")

    def _die(self, fault: Fault) -> None:
        server = self.servers[fault.who]
        server.die()
        self._world.clock.after(fault.seconds, self.tell_of_death, server)

    def _fall_silent(self, fault: Fault) -> None:
        server = self.servers[fault.who]
        server.silent, server.alive = True, fault.kind == "stall"


class Servers(Group):
    """`ports.Scoring` and `ports.References`; with a reference its state, a word that each move changes."""

    def __init__(self, kind: MemberKind, names: Sequence[str], world: World, disk: Disk) -> None:
        super().__init__(names, world)
        self._kind: MemberKind = kind
        self._disk = disk
        self.state = "the policy's start"
        self._moves = False

    def restore(self, folder: Path | None, moves: bool) -> None:
        """`folder`: the checkpoint that the run goes on from. `moves`: whether the reference does."""
        self._moves = moves
        if folder is not None and moves:
            self.state = (folder / REFERENCE_FILE).read_text(encoding="utf-8")

    def submit(self, server: str, key: str, body: Handle[Tokens], temperature: float = 1.0) -> None:
        """See `ports`."""
        self._world.post(server, self._begin, self.servers[server], key, body.place)

    def _begin(self, server: Server, key: str, body: Body) -> None:
        if server.dead:
            self.tell_of_death(server)
        seconds = self._world.seconds(0.05, 5.0, self._kind, key)
        self._world.clock.after(server.done_after(seconds), self._serve, server, key, body)

    def _serve(self, server: Server, key: str, body: Body) -> None:
        if not server.works:
            return
        answer: Event
        if body.lost:
            answer = Undone(self._kind, server.name, key)
        elif self._kind == "scoring":
            answer = Scored(server.name, key, body.truth.scores)
        else:
            samples = len(body.truth.lengths)
            kl = np.array([number(self.state, body.truth.digest, i) for i in range(samples)], np.float32)
            word = digest(self.state, body.truth.digest)
            if key.startswith("train/") and self._world.strike("far", server.name):
                kl, word = kl + FAR_KL, FAR
            made: Handle[Any] = Handle(self._made(server, word))
            answer = Compared(server.name, key, Referenced(ReferenceHead(kl, -kl - 1.0), made))
        self._world.tell(server.name, answer)

    def _made(self, server: Server, word: str) -> Logprobs:
        """They may be lost on their way, alone or with the server."""
        made = Logprobs(word, lost=self._world.strike("undone", server.name) is not None)
        server.made.append(made)
        if fault := self._world.strike("farewell", server.name):
            self._world.clock.after(fault.seconds, self._leave, server)
        return made

    def _leave(self, server: Server) -> None:
        server.die()
        self._world.clock.after(HUSH_S, self.tell_of_death, server)

    def update(self, announcement: Announcement, keep: float) -> None:
        """See `ports.References`."""
        self.state = digest(self.state, announcement.hashes, keep)
        self._world.inbox.wait(0.5)

    def save(self, folder: Path) -> None:
        """See `ports.References`."""
        if self._moves:
            self._disk.write("write reference", folder / REFERENCE_FILE, self.state)


@dataclass(frozen=True, slots=True)
class Trained:
    """One group of a step, as the learner gets it."""

    key: str
    uid: str
    tokens: int
    """Sampled, of the rows that are trained on and of the others."""
    digest: str
    """Of all that the learner learns from."""


class Collator(Group):
    """`ports.Bodies`."""

    def __init__(self, world: World, disk: Disk, longest_lag: int, age: str) -> None:
        super().__init__([COLLATOR], world)
        self._disk = disk
        self._longest_lag, self._age = longest_lag, age
        self.server = self.servers[COLLATOR]
        self.bodies: dict[str, Body | None] = {}
        """What it was asked to keep and not to forget; None: not there yet."""
        self.logprobs: dict[str, str] = {}
        self.copies: dict[str, Sampled] = {}
        """Of groups that are being sampled."""
        self.history: dict[int, str] = {}
        """Version -> weights that were published as that."""
        self.faulted: Callable[[int, Sequence[str]], None] = lambda step, uids: None
        """Told of a step whose batch is saved, and its groups."""

    def keep(self, bodies: Mapping[str, Handle[Tokens]]) -> None:
        """See `ports.Bodies`."""
        for key, handle in bodies.items():
            self._world.post(COLLATOR, self._keep, key, handle.place)

    def _keep(self, key: str, body: Body) -> None:
        self.bodies[key] = None
        self.copies.pop(key, None)
        self._world.clock.after(self._world.seconds(0.01, 1.0, "keep", key), self._kept, key, body)

    def _kept(self, key: str, body: Body) -> None:
        if not self.server.works:
            return
        if body.lost:
            self._world.tell(COLLATOR, Undone("collator", COLLATOR, key))
            return
        if key in self.bodies:  # what was forgotten meanwhile stays forgotten
            self.bodies[key] = body
        self._world.tell(COLLATOR, Kept(key))

    def keep_references(self, logprobs: Mapping[str, Handle[np.ndarray]]) -> None:
        """See `ports.Bodies`."""
        for key, handle in logprobs.items():
            self._world.post(COLLATOR, self._fetch_reference, key, handle.place)

    def _fetch_reference(self, key: str, logprobs: Logprobs) -> None:
        self._world.clock.after(self._world.seconds(0.01, 1.0, "fetch", key), self._fetched, key, logprobs)

    def _fetched(self, key: str, logprobs: Logprobs) -> None:
        if not self.server.works:
            return
        if logprobs.lost:
            self._world.seen["reference logprobs were lost"] += 1
        elif key in self.bodies:
            self.logprobs[key] = logprobs.word
        self._world.tell(COLLATOR, ReferenceKept(key, logprobs.lost))

    def keep_copy(self, key: str, body: Handle[Tokens]) -> None:
        """See `ports.Bodies`."""
        self._world.post(COLLATOR, self._keep_copy, key, body.place)

    def _keep_copy(self, key: str, sampled: Sampled) -> None:
        """Its own from now on, unless they are lost on the way."""
        if not any(body.lost for body in sampled.bodies):
            self.copies[key] = replace(sampled, bodies=[])

    def recall(self, key: str) -> None:
        """See `ports.Bodies`."""
        self._world.post(COLLATOR, self._recall, key)

    def _recall(self, key: str) -> None:
        if self.server.works:
            found = self.copies.pop(key, None)
            told = PartialLost(key) if found is None else Partial(key, np.zeros(1, np.int64), Handle(found))
            self._world.tell(COLLATOR, told)

    def forget(self, keys: Sequence[str]) -> None:
        """See `ports.Bodies`."""
        self._world.post(COLLATOR, self._forget, tuple(keys))

    def _forget(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.bodies.pop(key, None)
            self.logprobs.pop(key, None)
            self.copies.pop(key, None)

    def forget_all(self) -> None:
        """See `ports.Bodies`."""
        self._world.post(COLLATOR, lambda: self._forget([*self.bodies, *self.logprobs, *self.copies]))

    def texts(self, keys: Sequence[str]) -> list[tuple[str, ...]]:
        """See `ports.Bodies`."""
        self._call("show samples")
        return [(self._found(key).truth.digest,) for key in keys]

    def save_step(
        self,
        path: Path,
        shards: Sequence[Shard],
        keys: Sequence[str],
        compared: bool,
        estimates: Estimates,
        facts: Mapping[str, Any],
    ) -> None:
        """See `ports.Bodies`."""
        self._call("save the batch")
        self.faulted(facts["step"], [self._found(key).uid for key in keys])
        self._disk.write("write faulty batch", path, digest(list(keys)))

    def batches(self, shards: Sequence[Shard], keys: Sequence[str], compared: bool) -> Sequence[Handle[Any]]:
        """See `ports.Bodies`; a rank gets its shard, and its groups as `Trained`."""
        self._call("lay out the batch")
        groups: list[Trained] = []
        for key in keys:
            body = self._found(key)
            self._check_versions(body, shards[0].version)
            if compared and key not in self.logprobs:
                raise Broken("whole", f"{key} is trained on without the reference's logprobs")
            if self.logprobs.get(key) == FAR:
                raise Broken("numbers", f"{key} is learnt from, far from the reference")
            what = digest(body.truth.digest, self.logprobs.get(key, ""))
            groups.append(Trained(key, body.uid, int(body.truth.lengths.sum()), what))
        return [Handle((shard, tuple(groups))) for shard in shards]

    def _call(self, what: str) -> None:
        """One that is waited for, after all that was posted before."""
        seen: list[bool] = []
        self._world.post(COLLATOR, seen.append, True)
        answered = self._world.inbox.wait(CALL_LIMIT_S, lambda: bool(seen) and self.server.works)
        if self.server.dead:
            raise ActorLost(f"{COLLATOR} died before it could {what}")
        if not answered:
            raise ActorTimeout(f"{COLLATOR} did not {what} in time")

    def _found(self, key: str) -> Body:
        if (body := self.bodies.get(key)) is None:
            raise Broken("kept", f"{key} is asked for, and the collator does not have it")
        return body

    def _check_versions(self, body: Body, version: int) -> None:
        """Every token is of weights that were published as its version, and none is too old."""
        for span in body.spans:
            if self.history.get(span.version) != span.weights:
                raise Broken("weights", f"{body.key} was sampled as of version {span.version} by other weights")
        spans = body.spans
        age: float = version - min(span.version for span in spans)
        if self._age == "first":
            age = version - spans[0].version
        elif self._age == "mean":
            seconds = sum(span.seconds for span in spans)
            age = version - sum(span.seconds * span.version for span in spans) / seconds
        if age > self._longest_lag + 1e-9:
            raise Broken("lag", f"{body.key} is {age:g} versions old, and the most is {self._longest_lag}")
