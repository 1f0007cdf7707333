"""One seed: the run's lives, one after another, and what must hold of them."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from chaos.checks import Result, check_end, explained, result_of
from chaos.clock import Broken
from chaos.disk import OUTPUT, Crash
from chaos.life import Life, live
from chaos.plan import ANY_WRITE, Fault, Plan, Settings
from chaos.shrink import shrink
from chaos.witness import Witness
from rlhf_dist.models import guarded_files

ROOT = Path("/dev/shm")
"""Run directories are in memory: what is searched for are orders of events, not a disk's own faults."""
MORE_LIVES = 3
"""After the last one with faults: to the end, and with more steps to the end of those."""


@dataclass(slots=True)
class Found:
    """What a seed came to."""

    plan: Plan
    lives: int = 0
    calls: int = 0
    seconds: float = 0.0
    """Of virtual time."""
    kinds: Counter[str] = field(default_factory=Counter)
    """Faults that struck, by kind; of durable writes with the name."""
    endings: Counter[str] = field(default_factory=Counter)
    """How lives ended, by the name of the exception."""
    seen: Counter[str] = field(default_factory=Counter)
    """See `World`."""
    writes: int = 0
    names: Counter[str] = field(default_factory=Counter)
    """Name of a durable write -> how often it was done."""
    steps: int = 0
    named: dict[Fault, Fault] = field(default_factory=dict)
    """See `Disk`."""
    broken: Broken | None = None

    def saw(self, life: Life) -> None:
        """Count a life."""
        self.lives += 1
        self.calls += life.world.clock.calls
        self.seconds += life.world.clock.now
        self.named |= life.disk.named
        self.names.update(life.disk.counts)
        self.writes += life.disk.counts[ANY_WRITE]
        self.seen.update(life.world.seen)
        self.kinds.update(fault.kind for fault in life.world.fired)
        self.kinds.update(f"{fault.kind} {fault.who}" for fault in life.disk.fired)
        self.endings[type(life.failure).__name__ if life.failure is not None else "finished"] += 1


class AtOnce:
    """In place of the threads that hash a checkpoint's files: starting them takes longer than a small run."""

    def __init__(self, threads: int) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, call: Callable[[Any], Any], over: Iterable[Any]) -> Iterator[Any]:
        """As an executor's."""
        return map(call, over)


@contextmanager
def without_threads() -> Iterator[None]:
    """All that happens in the block happens in one thread, in one order."""
    threads = guarded_files.ThreadPoolExecutor
    guarded_files.ThreadPoolExecutor = AtOnce
    try:
        yield
    finally:
        guarded_files.ThreadPoolExecutor = threads


@contextmanager
def folder() -> Iterator[Path]:
    """A place for one run, gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix=OUTPUT, dir=ROOT if ROOT.is_dir() else None))
    try:
        yield place
    finally:
        with suppress(OSError):
            shutil.rmtree(place)


def search(plan: Plan) -> Found:
    """Run a plan to its end; what does not hold is in `broken`."""
    found = Found(plan)
    try:
        result = _whole(plan, found)
        plain = replace(plan.settings, background=False)
        # Where nothing struck, this was the run that nothing disturbs.
        settled = plan.settled and (found.kinds.total() or plan.settings != plain)
        if settled and (difference := result.differs(uncut(plan.seed, plain))):
            raise Broken("uncut", f"not as in a run that nothing disturbs: {difference}")
    except Broken as error:
        found.broken = error
    except Exception as error:
        found.broken = Broken("raised", f"{type(error).__name__}: {error}")
        found.broken.__cause__ = error
    return found


@lru_cache(64)
def uncut(seed: int, settings: Settings) -> Result:
    """What a run comes to that nothing disturbs."""
    plan = Plan(seed, settings, ())
    return _whole(plan, Found(plan))


def smallest(found: Found) -> Found:
    """The smallest run that breaks the same rule."""
    assert found.broken is not None
    rule = found.broken.rule

    def fails(plan: Plan) -> bool:
        other = search(plan).broken
        return other is not None and other.rule == rule

    named = replace(found.plan, faults=tuple(found.named.get(fault, fault) for fault in found.plan.faults))
    return search(shrink(named if fails(named) else found.plan, fails))


def _whole(plan: Plan, found: Found) -> Result:
    """All lives of a run."""
    last = max((fault.life for fault in plan.faults), default=-1)
    witness, settings, steps = Witness(), plan.settings, plan.settings.steps
    with folder() as place, without_threads():
        for number in range(last + 1 + MORE_LIVES):
            life = live(plan, number, place, witness, steps)
            found.saw(life)
            if life.failure is None:
                check_end(plan, life, place / "run", witness, steps)
                if steps == settings.steps + settings.more:
                    found.steps += steps
                    return result_of(place / "run")
                steps += settings.more
            elif not isinstance(life.failure, Crash):
                explained(plan, life)
            elif not life.fired:
                raise Broken("unexplained", "a crash that was not planned")
    raise Broken("no end", f"{last + 1 + MORE_LIVES} starts, and the last {MORE_LIVES} without faults")
