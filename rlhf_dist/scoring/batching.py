"""Dynamic batching: callers on many threads, one thread that works, batches cut by tokens."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Generic, TypeVar

from rlhf_dist.errors import ActorTimeout, RunError

Item = TypeVar("Item")
Result = TypeVar("Result")

CLOSE_LIMIT_S = 10.0
IDLE_S = 60.0
"""The longest that the thread waits for work before it looks again."""


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    tokens: int
    answer: Future[Result]


class TokenBatcher(Generic[Item, Result]):
    """Puts together what waits and hands it to one function, on one thread of its own."""

    def __init__(self, run: Callable[[list[Item]], Sequence[Result]], budget_tokens: int, name: str) -> None:
        """`run` takes items and returns as many results, in their order. `budget_tokens`: of a batch, at least 1.
        `name`: who is waited for, in messages, as in `the reward model judge`."""
        assert budget_tokens >= 1, budget_tokens
        self._run = run
        self._budget = budget_tokens
        self._name = name
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._progress = 0.0
        """When a batch began or ended last, monotonic."""
        self._thread = threading.Thread(target=self._work, daemon=True, name=name)
        self._thread.start()

    def submit(self, item: Item, tokens: int, timeout_s: float) -> Result:
        """The result for `item`, which counts `tokens`; waits for its batch. May be called from any thread.

        Raises what `run` raised for the batch, `RunError` when closed, and `ActorTimeout` where no batch has ended for
        `timeout_s` seconds: to wait behind others that come to their end is not charged.
        """
        waiting: _Waiting[Item, Result] = _Waiting(item, tokens, Future())
        with self._changed:
            if self._closed:
                raise RunError(f"{self._name} has been closed")
            self._waiting.append(waiting)
            self._changed.notify()
        asked = time.monotonic()
        while (left := max(asked, self._progress) + timeout_s - time.monotonic()) > 0:
            try:
                return waiting.answer.result(left)
            except FutureTimeout:
                if waiting.answer.done():  # `run` itself raised a TimeoutError, or the answer came this very moment
                    return waiting.answer.result(0)
        begun = not waiting.answer.cancel()
        raise ActorTimeout(
            f"{self._name} did not answer within {timeout_s:g} s: {tokens} tokens "
            + ("were being worked on" if begun else f"still waited, with {len(self._waiting)} requests in the line")
        )

    def close(self) -> None:
        """End the thread once its present batch is done; who waits is told. May be called twice."""
        with self._changed:
            self._closed = True
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify()
        for waiting in left:
            if waiting.answer.set_running_or_notify_cancel():
                waiting.answer.set_exception(RunError(f"{self._name} was closed while a request waited"))
        self._thread.join(CLOSE_LIMIT_S)

    def _work(self) -> None:
        while batch := self._next_batch():
            self._progress = time.monotonic()
            try:
                results = self._run([waiting.item for waiting in batch])
                assert len(results) == len(batch), (len(results), len(batch))
            except BaseException as error:  # whatever it is, the callers have to hear of it and the thread to go on
                self._progress = time.monotonic()
                for waiting in batch:
                    waiting.answer.set_exception(error)
                continue
            self._progress = time.monotonic()
            for waiting, result in zip(batch, results, strict=True):
                waiting.answer.set_result(result)

    def _next_batch(self) -> list[_Waiting[Item, Result]]:
        """What waits, in order, up to the budget; a larger item goes alone. Empty: closed."""
        batch: list[_Waiting[Item, Result]] = []
        while not batch:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed, IDLE_S)
                if self._closed:
                    return []
                tokens = 0
                while self._waiting and (not batch or tokens + self._waiting[0].tokens <= self._budget):
                    first = self._waiting.popleft()
                    if first.answer.set_running_or_notify_cancel():  # false: its caller gave up
                        batch.append(first)
                        tokens += first.tokens
        return batch
