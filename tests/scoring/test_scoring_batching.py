"""The batcher: what goes together, who hears of an error, and that no wait is without a limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given, strategies as st

from rlhf_dist.errors import ActorTimeout, RewardError, RunError
from rlhf_dist.scoring.batching import TokenBatcher

LIMIT_S = 30.0


class Gate:
    """A `run` whose first batch stays until `open`, so that a test decides what waits behind it."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, items: list[Any]) -> list[Any]:
        self.batches.append(items)
        self.entered.set()
        assert self.opened.wait(LIMIT_S)
        if any(item == "bad" for item in items):
            raise RewardError("a bad item")
        return [f"{item}!" for item in items]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


def line_up(batcher: TokenBatcher, pool: ThreadPoolExecutor, items: list[tuple[Any, int]]) -> list[Future]:
    """Submit one after another, each known to wait before the next comes."""
    futures = []
    for item, tokens in items:
        before = len(batcher._waiting)
        futures.append(pool.submit(batcher.submit, item, tokens, LIMIT_S))
        wait_until(lambda before=before: len(batcher._waiting) > before)
    return futures


def wait_until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(3000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("the condition never came true")


def blocked(pool: ThreadPoolExecutor, gate: Gate, budget: int) -> tuple[TokenBatcher, Future]:
    batcher = TokenBatcher(gate, budget, "the judge")
    first = pool.submit(batcher.submit, "first", 1, LIMIT_S)
    assert gate.entered.wait(LIMIT_S)
    return batcher, first


def test_what_waits_goes_together_in_order_up_to_the_budget(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher, first = blocked(pool, gate, 10)
    futures = line_up(batcher, pool, [("a", 4), ("b", 6), ("c", 1), ("large", 50), ("d", 5), ("e", 5), ("f", 1)])
    gate.opened.set()
    assert [future.result(LIMIT_S) for future in (first, *futures)] == [
        f"{item}!" for item in ("first", "a", "b", "c", "large", "d", "e", "f")
    ]
    assert gate.batches == [["first"], ["a", "b"], ["c"], ["large"], ["d", "e"], ["f"]]
    batcher.close()


def test_an_error_reaches_exactly_the_callers_of_its_batch(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher, first = blocked(pool, gate, 10)
    futures = line_up(batcher, pool, [("a", 5), ("bad", 5), ("b", 5)])
    gate.opened.set()
    assert first.result(LIMIT_S) == "first!" and futures[2].result(LIMIT_S) == "b!"
    for future in futures[:2]:
        with pytest.raises(RewardError, match="a bad item"):
            future.result(LIMIT_S)
    assert batcher.submit("again", 1, LIMIT_S) == "again!"
    batcher.close()


def test_even_an_exit_does_not_end_the_thread() -> None:
    def leave(items: list[int]) -> list[int]:
        raise SystemExit(3)

    with closing(TokenBatcher(leave, 10, "the judge")) as batcher:
        for _ in range(2):
            with pytest.raises(SystemExit):
                batcher.submit(1, 1, LIMIT_S)


def test_a_wait_has_a_limit_and_names_whom_it_waited_for(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher, first = blocked(pool, gate, 10)
    with pytest.raises(ActorTimeout, match=r"the judge did not answer within 0\.05 s: 7 tokens still waited, with 1"):
        batcher.submit("late", 7, 0.05)
    gate.opened.set()
    assert first.result(LIMIT_S) == "first!"
    assert batcher.submit("next", 1, LIMIT_S) == "next!"
    assert gate.batches == [["first"], ["next"]], "what nobody waits for any more is not worked on"
    batcher.close()


def test_a_limit_that_passes_during_the_work_is_told_as_such() -> None:
    gate = Gate()
    batcher = TokenBatcher(gate, 10, "the judge")
    with pytest.raises(ActorTimeout, match=r"3 tokens were being worked on"):
        batcher.submit("slow", 3, 0.2)
    gate.opened.set()
    assert batcher.submit("next", 1, LIMIT_S) == "next!"
    batcher.close()


def test_a_backlog_that_comes_to_its_end_is_waited_for() -> None:
    """64 groups of 0.05 s, one a batch: the last waits for 3 s with a limit of 1 s."""

    def run(items: list[int]) -> list[int]:
        time.sleep(0.05)
        return items

    begun = time.monotonic()
    with closing(TokenBatcher(run, 1, "the judge")) as batcher, ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda item: batcher.submit(item, 1, 1.0), range(64))) == list(range(64))
    assert time.monotonic() - begun >= 3.2


def test_one_that_hangs_in_a_backlog_is_told_within_its_limit() -> None:
    """The others had their turn before it; the time since then is what counts."""
    opened = threading.Event()

    def run(items: list[str]) -> list[str]:
        if items == ["hangs"]:
            opened.wait(LIMIT_S)
        time.sleep(0.05)
        return items

    with ThreadPoolExecutor(16) as pool:
        batcher = TokenBatcher(run, 1, "the judge")
        before = [pool.submit(batcher.submit, "before", 1, 0.4) for _ in range(10)]
        wait_until(lambda: any(future.done() for future in before))
        begun = time.monotonic()
        with pytest.raises(
            ActorTimeout, match=r"^the judge did not answer within 0\.4 s: 1 tokens were being worked on"
        ):
            batcher.submit("hangs", 1, 0.4)
        assert [future.result(LIMIT_S) for future in before] == ["before"] * 10
        assert 0.4 < time.monotonic() - begun < 3.0
        opened.set()
        batcher.close()


def test_a_time_limit_of_the_work_itself_is_not_taken_for_the_callers() -> None:
    def run(items: list[int]) -> list[int]:
        raise TimeoutError("inside")

    with closing(TokenBatcher(run, 10, "the judge")) as batcher, pytest.raises(TimeoutError, match="inside"):
        batcher.submit(1, 1, LIMIT_S)


def test_closing_tells_who_waits_and_refuses_who_comes(pool: ThreadPoolExecutor) -> None:
    gate = Gate()
    batcher, first = blocked(pool, gate, 10)
    (waiting,) = line_up(batcher, pool, [("a", 1)])
    closed = pool.submit(batcher.close)
    with pytest.raises(RunError, match="the judge was closed while a request waited"):
        waiting.result(LIMIT_S)
    with pytest.raises(RunError, match="the judge has been closed"):
        batcher.submit("b", 1, LIMIT_S)
    gate.opened.set()
    assert first.result(LIMIT_S) == "first!"
    closed.result(LIMIT_S)
    assert not batcher._thread.is_alive()
    batcher.close()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40))
def test_every_caller_gets_its_own_answer(sizes: list[int]) -> None:
    batches: list[list[tuple[int, int]]] = []

    def run(items: list[tuple[int, int]]) -> list[int]:
        batches.append(items)
        return [index for index, _ in items]

    with closing(TokenBatcher(run, 10, "the judge")) as batcher, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda pair: batcher.submit(pair, pair[1], LIMIT_S), enumerate(sizes)))
    assert answers == list(range(len(sizes)))
    assert all(len(batch) == 1 or sum(tokens for _, tokens in batch) <= 10 for batch in batches)
