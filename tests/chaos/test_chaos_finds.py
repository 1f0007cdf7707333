"""The search finds what is wrong: with the product broken on purpose, a seed fails, and a small plan says why.

Without the second account, which would find most of it before anything comes of it: see test_chaos_account.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mistakes import Mistake, first_that_fails, made

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import chaos.fleet
from chaos.plan import Settings
from chaos.search import smallest

from rlhf_dist.loop.controller import Controller
from rlhf_dist.loop.controller_rules import Rules
from rlhf_dist.loop.events import Book, Event, ReferenceKept, Undone
from rlhf_dist.loop.healing import Healing
from rlhf_dist.loop.ledger import Ledger
from rlhf_dist.loop.members import Members
from rlhf_dist.loop.open_groups import OpenRequest
from rlhf_dist.loop.run_directory import RunDirectory
from rlhf_dist.loop.servers import Servers
from rlhf_dist.loop.shell import Shell

PATCH = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny arrays need no more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def a_seat_too_many(patch: PATCH) -> None:
    seats = Rules.seats.fget  # pyright: ignore[reportAttributeAccessIssue]
    patch.setattr(Rules, "seats", property(lambda self: seats(self) + self.groups_per_step))


def booked_without(patch: PATCH, left_out: Callable[[Book], bool]) -> None:
    real = Ledger.book
    patch.setattr(Ledger, "book", lambda self, entries: real(self, [e for e in entries if not left_out(e)]))


def served_before_it_has_proved(patch: PATCH) -> None:
    real = Members.returned

    def returned(self: Members, name: str) -> None:
        real(self, name)
        self.serve([*self.serving, name])

    patch.setattr(Members, "returned", returned)


def deaf_to_lost_bodies(patch: PATCH) -> None:
    real = Controller.handle
    patch.setattr(Controller, "handle", lambda self, e, now: [] if isinstance(e, Undone) else real(self, e, now))


def deaf_to_lost_logprobs(patch: PATCH) -> None:
    real = Controller.handle

    def handle(self: Controller, event: Event, now: float) -> Any:
        return real(self, replace(event, lost=False) if isinstance(event, ReferenceKept) else event, now)

    patch.setattr(Controller, "handle", handle)


MISTAKES: dict[str, Mistake] = {
    "a seat too many": Mistake(a_seat_too_many, ("lag", "uncut", "lost"), 1),
    "drops are not written": Mistake(lambda p: booked_without(p, lambda e: e.reason == "no_signal"), ("ledger",), 0),
    "duplicates are accepted": Mistake(
        lambda p: p.setattr(OpenRequest, "knows", lambda *_: False), ("unexplained", "left over", "kept", "raised"), 3
    ),
    "receipts are not compared": Mistake(
        lambda p: p.setattr(chaos.fleet, "receipt_problem", lambda *_: None),
        ("weights", "raised", "uncut", "no end"),
        2,
    ),
    "nobody is ever silent": Mistake(lambda p: p.setattr(Healing, "overdue", lambda *_: []), ("no end",), 1),
    "a resume does not go back in the ledger": Mistake(
        lambda p: p.setattr(Ledger, "rewind", lambda *_: ()), ("unexplained",), 1
    ),
    "a resume does not go back in the metrics": Mistake(
        lambda p: p.setattr(RunDirectory, "rewind_metrics", lambda *_: 0), ("metrics",), 1
    ),
    "a checkpoint forgets what is open": Mistake(
        lambda p: p.setattr(Controller, "open_groups", lambda _: {}), ("lost", "uncut", "witness"), 1
    ),
    "lost bodies are not heard of": Mistake(deaf_to_lost_bodies, ("unexplained", "no end"), 2),
    "lost logprobs are not heard of": Mistake(deaf_to_lost_logprobs, ("whole",), 1),
    "a server that is back is not asked again": Mistake(
        lambda p: p.setattr(Servers, "returned", lambda *_: []), ("no end",), 1
    ),
    "a worker that is back is given work before it proved the weights": Mistake(
        served_before_it_has_proved, ("serves", "weights", "raised"), 1
    ),
    "the collator is not told to forget": Mistake(
        lambda p: p.setattr(Shell, "forget", lambda *_: None), ("left over",), 0
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_and_made_small(name: str) -> None:
    mistake = MISTAKES[name]
    with made(mistake, account=False):
        found = first_that_fails()
        assert found.broken is not None and found.broken.rule in mistake.rules, str(found.broken)
        small = smallest(found)
    assert small.broken is not None and small.broken.rule == found.broken.rule
    assert len(small.plan.faults) <= mistake.faults, str(small.plan)
    assert size(small.plan.settings) <= size(found.plan.settings)


def size(settings: Settings) -> int:
    values: list[Any] = [settings.steps, settings.groups, settings.workers, settings.scorers, settings.reference]
    return sum(values)
