"""Light actors that stand in for workers, servers and ranks, in a real Ray, and their fixtures."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import ray
from sample_groups import group_of, request_of

from rlhf_dist.cluster.actors import tokens_at
from rlhf_dist.cluster.collator_host import CollatorHost
from rlhf_dist.cluster.inbox import Inbox
from rlhf_dist.cluster.rollout_fleet import RolloutFleet
from rlhf_dist.cluster.roster import Alive, as_actor
from rlhf_dist.cluster.spec import ActorSpec, enter
from rlhf_dist.cluster.waits import fetched, gather
from rlhf_dist.config.schema import Config
from rlhf_dist.errors import DataError, EngineBroken, WeightSyncError
from rlhf_dist.loop.events import Event
from rlhf_dist.rollout import worker as rollout_worker
from rlhf_dist.rollout.trajectories import Response, Turn
from rlhf_dist.rollout.worker import RolloutWorker, Verb
from rlhf_dist.telemetry.metrics import MetricSums
from rlhf_dist.types import (
    UNFINISHED,
    Answered,
    Beat,
    Group,
    Handle,
    Message,
    Prompt,
    Receipt,
    ReferenceHead,
    Scores,
)
from rlhf_dist.weights.buckets import make_plan
from rlhf_dist.weights.receipts import Announcement, Round, Sent

if TYPE_CHECKING:  # each stand-in is a process that imports this module, and torch takes seconds
    from rlhf_dist.learner.token_sums import EstimateSums, Whitening

LONG = 100
"""Tokens of a prompt, one a character, that a worker refuses."""
PROMPTS = [Prompt(f"0/{i}", (Message("user", "x" * (LONG if i == 4 else 1)),), "abc", "test") for i in range(5)]
REQUESTS = [request_of(prompt, 2) for prompt in PROMPTS]
ANNOUNCEMENT = Announcement(3, "unused", 0, make_plan([("a", (4,), "float32")], 8), ("hash",))
THREADS = 8


def group(prompt: Prompt, texts: tuple[str, ...] = ("a", "bc")) -> Group:
    return group_of([1], range(len(texts)), [1] * len(texts), prompt=prompt, version=3, texts=texts)


class LightEngine:
    """Ends every response in one step, but for those of a prompt that it was told to hold: `holds 0/2 torn`."""

    tokenizer = None

    def __init__(self, stand: Stand, tokens: int) -> None:
        self._stand = stand
        self._tokens = tokens
        self._under_way: list[Turn] = []
        self._version = 3

    def submit(self, turn: Turn) -> None:
        self._under_way.append(turn)

    def step(self) -> list[Response]:
        self._stand.work()
        ended = [turn for turn in self._under_way if not self._stand.holds(turn.key)]
        self._under_way = [turn for turn in self._under_way if turn not in ended]
        time.sleep(0.0 if ended else 0.01)
        return [self._response(turn) for turn in ended]

    def abort(self, keys: Iterable[str]) -> None:
        gone = set(keys)
        self._under_way = [turn for turn in self._under_way if turn.key not in gone]

    def interrupt(self, keys: Sequence[str]) -> list[Response]:
        found = self.so_far(keys)
        self.abort(keys)
        return found

    def so_far(self, keys: Sequence[str]) -> list[Response]:
        """Each is half done."""
        found = {turn.key: self._response(turn, self._tokens // 2, UNFINISHED) for turn in self._under_way}
        return [found[key] for key in keys]

    def usage(self) -> rollout_worker.Usage:
        return rollout_worker.Usage(len(self._under_way), 0.0)

    def prepare_weights(self, announcement: Announcement) -> None:
        pass

    def sleep(self) -> None:
        self._stand.work()

    def load_weights(self, announcement: Announcement) -> Receipt:
        found = self._stand.receipt(announcement)
        self._version = announcement.version
        return found

    def _response(self, turn: Turn, count: int = -1, reason: str = "stop") -> Response:
        """The first tokens of a response, `count` or all; those that it begins with are not sampled again."""
        begun, n = turn.begun, self._tokens if count < 0 else count
        tokens = [*begun.tokens] if begun is not None else []
        versions = [*begun.versions] if begun is not None else []
        first = tokens[0] if tokens else turn.seed % 1000
        new = list(range(first + len(tokens), first + n))
        of_token = np.array([*versions, *[self._version] * len(new)], np.int32)
        text = "ab"[turn.seed % 2]
        return Response(turn.key, [*tokens, *new], np.zeros(n, np.float32), of_token, of_token, reason, text)


class Stand:
    """Stands in for a worker, a server, a weight relay and a learner rank; does as it was last told."""

    def __init__(self, name: str, tokens: int, copy_every_s: float) -> None:
        """`tokens`: of each response. `copy_every_s`: as of a rollout worker."""
        self._name, self._copy_every_s = name, copy_every_s
        self._mode = "right"
        self._tokens = tokens
        self._path = ""
        self._rounds: list[Round] = []
        self._answers: list[Sent] = []
        rollout_worker.render = lambda tokenizer, messages, chat: [1] * len(messages[0].content)
        self.anew()

    def anew(self) -> None:
        """Be a rollout worker that nobody has asked for anything."""
        engine = LightEngine(self, self._tokens)
        self._worker = RolloutWorker(
            self._name,
            engine,
            chat=False,
            max_prompt_tokens=LONG - 1,
            keep=lambda group: Handle(ray.put(group)),
            get=lambda handles: fetched([handle.place for handle in handles], 10.0),
            copy_every_s=self._copy_every_s,
        )
        threading.Thread(target=self._worker.run, daemon=True).start()

    def post(self, number: int, verb: Verb) -> None:
        self._worker.post(number, verb)

    def events(self, wait_s: float) -> Any:
        return self._worker.events(wait_s)

    def load_weights(self, announcement: Announcement) -> Receipt:
        return self._worker.load_weights(announcement)

    def sleep(self, number: int) -> None:
        self._worker.sleep(number)

    def holds(self, turn: str) -> bool:
        return self._mode.startswith("holds ") and turn.split("/", 1)[1].startswith(f"{self._mode.split()[1]}/")

    def be(self, mode: str) -> str:
        self._mode = mode
        return mode

    def leave_signs(self, log: Path) -> int:
        """Be found by the controller, as the real ones are; returns the process id."""
        enter(ActorSpec(self._name, Config(), "", "cpu", 1, str(log), 0, ""))
        return os.getpid()

    def work(self) -> str:
        """Answer, or fail in the way it was told."""
        if self._mode == "sleeps":
            time.sleep(1.5)
        if self._mode == "hangs":
            time.sleep(8.0)
        if self._mode == "dies late":
            time.sleep(0.3)
        if self._mode.startswith("dies"):
            os._exit(7)
        if self._mode == "refuses":
            raise DataError("data.jsonl:3: not JSON")
        if self._mode == "breaks":
            raise IndexError("list index out of range")
        return self._name

    def offer(self, announcement: Announcement) -> tuple[str, int]:
        self.work()
        return self._name, 1

    def fetch(self, announcement: Announcement, address: tuple[str, int]) -> Announcement:
        self.work()
        return replace(announcement, path=f"of {self._name}, from {address[0]}")

    def loaded_from(self) -> str:
        return self._path

    def receipt(self, announcement: Announcement) -> Receipt:
        self.work()
        self._path = announcement.path
        if "torn" in self._mode.split():
            raise WeightSyncError("version 3: bucket 0 arrived torn; nothing was loaded")
        if self._mode == "broken":
            raise EngineBroken("the load of version 3 failed (OSError: gone)")
        made = announcement.round
        if made is not None and (self._mode == "off" or (self._mode == "off once" and made.number == 1)):
            raise WeightSyncError("version 3 was not sent: two did not get ready in time; nothing was loaded")
        found = "another hash" if self._mode == "lies" else announcement.hashes[0]
        return Receipt(self._name, announcement.version, (found,), {"a": 3 if self._mode == "skips" else 4})

    def publish(self, version: int) -> Announcement | None:
        return replace(ANNOUNCEMENT, version=version) if self._name == "one" else None

    def script(self, answers: list[Sent]) -> None:
        """What its next calls of `send` answer, as a learner's rank."""
        self._rounds, self._answers = [], answers

    def send(self, made: Round) -> Sent:
        self.work()
        self._rounds.append(made)
        return self._answers.pop(0)

    def rounds(self) -> list[Round]:
        """That it was asked to send in."""
        return self._rounds

    def update(self, batch: Any, credit: Any, whitening: Whitening) -> MetricSums:
        found = {"policy/loss": (batch, 1.0)}
        if credit is not None:
            found["credit"] = (credit - whitening.mean, 1.0)
        return MetricSums(found, {})

    def estimate(self, batch: Any) -> tuple[EstimateSums, Any]:
        from rlhf_dist.learner.token_sums import EstimateSums

        self.work()
        return EstimateSums(1.0, batch, 0.0, 0.0, 0.0, 0.0, 0.0), (ray.put(10.0 * batch),)

    def update_critic(self, batch: Any, credit: float) -> MetricSums:
        self.work()
        return MetricSums({"critic/loss": (batch + credit, 1.0)}, {})

    def save_critic(self, folder: Path) -> None:
        (folder / f"critic-{self._name}").touch()

    def save(self, folder: Path) -> None:
        (folder / f"policy-{self._name}").touch()

    def score(self, places: Sequence[Any]) -> Scores:
        self.work()
        group = tokens_at(places)
        total = np.full(len(group.trajectories), 1.0 if self._name == "one" else 2.0, np.float32)
        return Scores(total, {}, total, total.astype(np.uint64))

    def keep(self, keys: list[str], places: list[Any]) -> list[str]:
        self.work()
        return []

    def reference(self, places: Sequence[Any], temperature: float) -> Any:
        self.work()
        group = tokens_at(places)
        n, tokens = len(group.trajectories), sum(sample.length for sample in group.trajectories)
        head = ReferenceHead(np.full(n, temperature), np.zeros(n))
        return head, (ray.put(np.full(tokens, 1.0 if self._name == "one" else 2.0, np.float32)),)

    def move(self, announcement: Announcement, keep: float) -> Receipt:
        return self.receipt(announcement)

    def save_reference(self, folder: Path) -> None:
        (folder / f"reference-{self._name}").touch()

    def hand_over(self, other: Any) -> list[Any]:
        """A reference to an answer that is not there yet; it is sent to the process that asked for it: this one."""
        return [other.work.remote()]

    def close(self) -> None:
        self.work()


def remote(host: type[Any], threads: int = 1) -> Any:
    """The class as an actor's; its process imports the modules of the tests to know it."""
    here = {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{Path(__file__).parents[1]}"}
    made = as_actor(host) if issubclass(host, Alive) else ray.remote(host)
    return made.options(num_cpus=0, max_restarts=0, max_concurrency=threads, runtime_env={"env_vars": here})


def start(name: str, tokens: int = 1, copy_every_s: float = 0.0) -> Any:
    return remote(Stand, THREADS).remote(name, tokens, copy_every_s)


def start_collator(folder: Path) -> Any:
    """The real one."""
    spec = ActorSpec("collator", Config(), "", "cpu", 1, str(folder / "collator.log"), 0, "")
    return remote(CollatorHost).remote(spec)


@cache
def start_pair() -> dict[str, Any]:
    """Two workers, for all tests in this process that want them."""
    found = {"one": start("one"), "two": start("two")}
    assert gather({name: actor.work.remote() for name, actor in found.items()}, "start", 60) == {
        "one": "one",
        "two": "two",
    }
    return found


@pytest.fixture
def workers(local_ray: None) -> Iterator[dict[str, Any]]:
    pair = start_pair()
    gather({name: actor.anew.remote() for name, actor in pair.items()}, "be new", 30)
    yield pair
    gather({name: actor.be.remote("right") for name, actor in pair.items()}, "calm down", 30)


def tell(actor: Any, mode: str) -> None:
    # The first call of an actor waits for its process, which takes long on a busy machine.
    assert gather({"it": actor.be.remote(mode)}, "be", 120) == {"it": mode}


def handles(count: int) -> list[Handle[Group]]:
    return [Handle(ray.put(group(prompt))) for prompt in PROMPTS[:count]]


class Ears:
    """An inbox, and all that was heard."""

    def __init__(self) -> None:
        self.inbox = Inbox()
        self.heard: list[Event] = []
        self.inbox.listen(self.heard.extend)

    def of(self, *kinds: type) -> list[Any]:
        return [event for event in self.heard if isinstance(event, kinds)]

    def until(self, come: Callable[[], bool], limit_s: float = 60.0) -> None:
        end = time.monotonic() + limit_s
        while not come():
            assert time.monotonic() < end, self.heard
            self.inbox.pump()

    def hear(self, kind: type, count: int) -> list[Any]:
        """Wait until so many of this kind have come."""
        self.until(lambda: len(self.of(kind)) >= count)
        return self.of(kind)


def fleet(workers: dict[str, Any], ears: Ears, sync_timeout_s: float = 30.0, shares_gpu: bool = False) -> RolloutFleet:
    return RolloutFleet(workers, ears.inbox, timeout_s=30.0, sync_timeout_s=sync_timeout_s, shares_gpu=shares_gpu)


def makers(heard: Iterable[Event]) -> list[tuple[str, str]]:
    """(key, worker) of each answer: what is heard of a worker at once ends with its beat."""
    found, keys = list[tuple[str, str]](), list[str]()
    for event in heard:
        if isinstance(event, Answered):
            keys.append(event.key)
        elif isinstance(event, Beat):
            found, keys = [*found, *((key, event.worker) for key in keys)], []
    return found


def serve(rollouts: RolloutFleet, ears: Ears) -> set[str]:
    """Ask all who serve for a group; those who gave one."""
    names, before = rollouts.serving(), len(ears.of(Answered))
    for name in names:
        rollouts.submit(name, REQUESTS[:1])
    ears.hear(Answered, before + len(names))
    return {worker for _, worker in makers(ears.heard)[before:]}
