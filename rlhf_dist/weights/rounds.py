"""How who sends weights and who receives them agree on a transfer before any byte of a model is touched.

A round has two steps, in which the sender, learner rank 0, waits for every process of every engine: `ready`, and
`joined` once the way between them is open. After each it decides for all: `go`, or off with the reason. So an engine
that is silent or dead holds the others up for a time, and does them no harm.

They meet in a store that the sender serves. A client waits without end for a process that is stopped, so each call of
its is made in a thread, which is left behind then. The store's keys are not guarded: between nodes it needs a network
that is trusted, as the learner's ranks do.
"""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Literal, TypeVar

from torch.distributed import DistStoreError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from rlhf_dist.errors import WeightSyncError
from rlhf_dist.weights.receipts import MeetingPoint, Round, Sent, named_engines

T = TypeVar("T")
GO = b"go"
ANSWER_S = 5.0
"""For a store to answer what needs no waiting, or that a wait is over."""
Step = Literal["ready", "joined"]
GLOO = re.compile(r"^\[\S+:\d+\] (?P<what>.*?)(?:\. This is typically .*)?$")
"""A line of gloo's: where in its source, what, and advice for gloo's own developers."""


class Meeting:
    """The sender's end of the store."""

    def __init__(self, host: str) -> None:
        """Serve it at `host` only; torch itself would listen on all addresses. Raises OSError."""
        with socket.create_server((host, 0)) as server:
            port = server.getsockname()[1]
            listening = server.detach()
        self.address: tuple[str, int] = (host, port)
        self.store = TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening)

    def gather(self, made: Round, step: Step, ends: float) -> tuple[dict[int, str], Sent]:
        """Wait for all processes until `ends` on the monotonic clock; rank -> what it said, and who is left out."""
        ranks = range(1, len(made.engines) + 1)
        keys = [key(made, step, rank) for rank in ranks]
        awaited(self.store, keys, ends)
        there = {rank: self.store.get(own).decode() for rank, own in zip(ranks, keys, strict=True) if self._has(own)}
        for own in keys:
            self.store.delete_key(own)
        missing = named_engines(made, [rank for rank in ranks if rank not in there])
        if missing:
            late = f"{', '.join(missing)} did not get {step} in time"
            return there, Sent(missing, late)
        return there, Sent()

    def _has(self, own: str) -> bool:
        return bool(self.store.check([own]))

    def decide(self, made: Round, step: Step, found: Sent) -> None:
        """Tell everybody."""
        self.store.set(key(made, step, "decided"), found.problem or GO.decode())


class Client:
    """A store that another process serves. Every call ends; after one that had no answer none is tried."""

    def __init__(self, address: tuple[str, int], limit_s: float) -> None:
        """Raises RuntimeError where nobody answers."""
        self._silent = False
        self._store = self._ask(lambda: connected(address, limit_s), limit_s)

    def _ask(self, ask: Callable[[], T], limit_s: float = 0.0) -> T:
        if self._silent:
            raise RuntimeError("it does not answer")
        try:
            return in_time(ask, limit_s + ANSWER_S, "it does not answer")
        except Late:
            self._silent = True
            raise

    def set(self, name: str, value: str) -> None:
        """As a store's, like the other methods."""
        self._ask(lambda: self._store.set(name, value))

    def get(self, name: str) -> bytes:
        """Of what is there."""
        return self._ask(lambda: self._store.get(name))

    def check(self, names: list[str]) -> bool:
        """Whether all are there."""
        return self._ask(lambda: self._store.check(names))

    def wait(self, names: list[str], limit: timedelta) -> None:
        """Raises `DistStoreError` at the limit."""
        self._ask(lambda: self._store.wait(names, limit), limit.total_seconds())

    def delete_key(self, name: str) -> bool:
        """Whether it was there."""
        return self._ask(lambda: self._store.delete_key(name))


class Attendance:
    """A receiving process's end."""

    def __init__(self, meeting: MeetingPoint) -> None:
        """Raises `WeightSyncError` where nobody answers."""
        host, port = meeting.address
        try:
            self.store = Client(meeting.address, meeting.limit_s)
        except RuntimeError as error:
            text = f"the learner cannot be reached at {host}:{port}: {first_line(error)}"
            raise WeightSyncError(text) from None

    def arrive(self, made: Round, step: Step, rank: int, said: str, ends: float) -> None:
        """Say so, and wait for the decision. Raises `WeightSyncError` unless it is to go on."""
        who = f"version {made.version}"
        try:
            self.store.set(key(made, step, rank), said)
            decided = key(made, step, "decided")
            if not awaited(self.store, [decided], ends):
                raise WeightSyncError(f"{who}: learner rank 0 did not decide in time whether to send it")
            answer = self.store.get(decided)
        except RuntimeError as error:
            raise WeightSyncError(f"{who}: learner rank 0 cannot be asked any more: {first_line(error)}") from None
        if answer != GO:
            raise WeightSyncError(f"{who} was not sent: {answer.decode()}; nothing was loaded")


def key(made: Round, step: str, of: int | str) -> str:
    """Where something of a round stands in the store."""
    return f"{made.number}/{step}/{of}"


class Late(RuntimeError):
    """What was asked has not ended."""


def in_time(ask: Callable[[], T], limit_s: float, late: str) -> T:
    """What `ask` returns, in a thread that is left behind where it does not end; then `Late` says `late`.

    Raises what `ask` raises.
    """
    found: list[T] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            found.append(ask())
        except Exception as error:
            failures.append(error.with_traceback(None))

    thread = threading.Thread(target=run, daemon=True, name="weights")
    thread.start()
    thread.join(limit_s)
    if failures:
        raise failures[0]
    if not found:
        raise Late(late)
    return found[0]


def connected(address: tuple[str, int], limit_s: float) -> TCPStore:
    """A client of the store there. Raises RuntimeError."""
    host, port = address
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=limit_s), wait_for_workers=False)


def awaited(store: TCPStore | Client, keys: Sequence[str], ends: float) -> bool:
    """Whether all keys were there before `ends`. Raises RuntimeError where the store is gone."""
    left = max(ends - time.monotonic(), 0.001)
    try:
        store.wait(list(keys), timedelta(seconds=left))
    except DistStoreError:
        return bool(store.check(list(keys)))
    return True


def transfer_ends(ends: float, limit_s: float) -> float:
    """Until when a transfer that begins now may last: however slow the agreement was, half of a round's limit is left.

    Models are touched from here on, so too little time would be the end of all engines. `ends`: of the round.
    """
    return max(ends, time.monotonic() + limit_s / 2)


def first_line(error: Exception) -> str:
    """What it says, without the stacks that torch adds, and what gloo adds for its own developers."""
    line = str(error).partition("\n")[0]
    found = GLOO.match(line)
    return found["what"] if found else line
