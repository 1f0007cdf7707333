"""Waiting for other processes: every wait has a limit, names whom it waited for, and notices that Ray itself ended.

A time in which this process itself was stopped (Ctrl-Z, a suspended laptop) does not count against the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import ray
import ray.exceptions
from ray.exceptions import RayActorError, RayTaskError

from rlhf_dist.cluster.processes import ending, lost_ray, silent
from rlhf_dist.errors import (
    ActorLost,
    ActorTimeout,
    AnswerLost,
    RanksLost,
    RanksSilent,
    RayLost,
    RlhfError,
    RunError,
)
from rlhf_dist.telemetry.timeline import Patience

BLAME_LIMIT_S = 3.0
"""How long a failure waits for a death that may be its cause."""
COPY_LIMIT_S = 1.0
"""To read an object that is already on this node."""


Quiet = Callable[[Sequence[str]], float]
"""Seconds since one of these processes was last seen to go on with its work."""


def unseen_s(names: Sequence[str]) -> float:
    """Nobody looks."""
    return math.inf


class Wait(Protocol):
    """How to wait: see `wait`, and `inbox.Inbox.wait`, which hands events over meanwhile."""

    def __call__(self, calls: list[Any], patience: Patience, count: int = 1) -> list[Any]: ...


def gather(
    calls: Mapping[str, Any],
    what: str,
    timeout_s: float,
    key: str = "",
    waits: Wait | None = None,
    told: Callable[[RunError], RunError] = lambda error: error,
    quiet_s: Quiet = unseen_s,
) -> dict[str, Any]:
    """Wait for one answer from each: name of the process -> its call. `key` is the config key of the limit.

    Raises `ActorTimeout` naming those who did not answer, `ActorLost` naming one that died, or what the call raised;
    of these what `told` makes of it. While one of them goes on with its work, as `quiet_s` says, all have more time:
    the limit is then one without progress.
    """
    patience, moved = Patience(timeout_s), False
    pending = {call: name for name, call in calls.items()}
    answers: dict[str, Any] = {}
    while pending:
        done = (waits or wait)(list(pending), patience)
        if not done:
            late = list(pending.values())
            if (quiet := quiet_s(late)) < timeout_s:
                patience, moved = Patience(timeout_s - quiet), True
                continue
            raise told(ActorTimeout(silent(late, what, limit_text(timeout_s, key), moved), late))
        for call in done:
            name = pending.pop(call)
            try:
                answers[name] = fetch(call, name, what, timeout_s)
            except RunError as error:
                raise told(cause_of(error, pending, what)) from None
    return {name: answers[name] for name in calls}


def of_ranks(error: RunError) -> RunError:
    """What it means where ranks were asked: without one of them the others are of no use."""
    if isinstance(error, ActorTimeout):
        return RanksSilent(str(error), error.silent)
    return RanksLost(str(error)) if isinstance(error, ActorLost) else error


def wait(calls: list[Any], patience: Patience, count: int = 1) -> list[Any]:
    """Those of `calls` that are done: `count`, or fewer when the patience is at its end. Raises `RunError`."""
    while True:
        ready: list[Any] = patience.wait(lambda seconds: ray.wait(calls, num_returns=count, timeout=seconds)[0])
        if len(ready) >= count or patience.left <= 0:
            return ready
        require_ray()


def require_ray() -> None:
    """Raise `RayLost` when a process of Ray's own has ended: its workers are not to blame."""
    lost = lost_ray()
    if lost is not None:
        raise RayLost(lost)


def limit_text(timeout_s: float, key: str) -> str:
    """The limit, with the config key that sets it."""
    return f"{timeout_s:g} s" + (f" ({key})" if key else "")


def fetch(call: Any, name: str, what: str, timeout_s: float) -> Any:
    """The answer of a call that is done, or of its future, with the errors of the other process in this one's words."""
    try:
        return call.result(timeout_s) if isinstance(call, Future) else ray.get(call, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise ActorTimeout(f"{name} did not hand over the answer of '{what}' in {timeout_s:g} s", [name]) from None
    except RayTaskError as error:
        if isinstance(error.cause, RlhfError):
            raise error.cause from None
        if isinstance(error.cause, ray.exceptions.ObjectLostError):
            raise AnswerLost(f"what {name} needed for '{what}' is lost: {error.cause}") from None
        if isinstance(error.cause, OSError):
            require_ray()  # of a process whose raylet is gone
        raise RunError(f"{name} failed in '{what}': {type(error.cause).__name__}: {error.cause}\n{error}") from None
    except RayActorError as error:
        require_ray()
        raise ActorLost(f"{name} died during '{what}': {ending(name, str(error))}") from None
    except ray.exceptions.RayError as error:
        require_ray()
        kind = AnswerLost if isinstance(error, ray.exceptions.ObjectLostError) else ActorLost
        raise kind(f"the answer of {name} to '{what}' is lost: {type(error).__name__}: {error}") from None


def fetched(places: Sequence[Any], limit_s: float) -> list[Any | None]:
    """Copies of what others have put into the object store; None for what is lost, or has not come in `limit_s`."""
    come = set(ray.wait(list(places), num_returns=len(places), timeout=limit_s)[0])
    return [_copy(place) if place in come else None for place in places]


def _copy(place: Any) -> Any | None:
    try:
        return copy.deepcopy(ray.get(place, timeout=COPY_LIMIT_S))
    except ray.exceptions.RayError:
        return None


def cause_of(error: RunError, pending: Mapping[Any, str], what: str) -> RunError:
    """`error`, or the death of another process of the group that it comes from: a rank fails when its peer is gone."""
    if type(error) is not RunError or not pending:
        return error
    for call in wait(list(pending), Patience(BLAME_LIMIT_S), count=len(pending)):
        try:
            ray.get(call, timeout=BLAME_LIMIT_S)
        except RayActorError as death:
            return ActorLost(f"{pending[call]} died during '{what}': {ending(pending[call], str(death))}")
        except Exception:  # another one that failed for the same cause
            continue
    return error
