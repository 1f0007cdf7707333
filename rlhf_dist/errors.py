"""One exception family.

Exceptions take plain strings only, so that they pickle across Ray processes.
`InputError` means that what the user gave is wrong (exit code 2); `RunError` that a run which had started failed (exit
code 1).
"""

from __future__ import annotations

from collections.abc import Iterable

SIGNALLED = 128
"""Exit codes above it are those of a command that a signal ended: 128 + its number."""


class RlhfError(ValueError):
    """Base of everything this package raises on purpose: one message that says what, where and the way out."""


class InputError(RlhfError):
    """What the user gave is wrong: a config key, a file, a line. Exit code 2."""


class ConfigError(InputError):
    """A config key has a wrong name, type or value, or two keys contradict each other."""


class DataError(InputError):
    """A data file is missing or has a bad line; the message starts with `file:line`."""


class ModelError(InputError):
    """A model directory lacks something, or an engine refuses the model's shape."""


class ResourceError(InputError):
    """The machine or the cluster lacks what the config asks for: CPUs, GPUs, disk."""


class TooSmall(ResourceError):
    """There are fewer CPUs or GPUs than the config asks for in sum."""


class RunError(RlhfError):
    """A run that had started failed. Exit code 1; what was saved can be resumed."""


class NumbersError(RunError):
    """A loss, a gradient or another number of a training step went wrong."""


class ActorTimeout(RunError):
    """Another process did not answer in time; the message names it, the call and the limit."""

    def __init__(self, message: str, silent: Iterable[str] = ()) -> None:
        """`silent`: names of the processes that did not; empty: it may be any."""
        super().__init__(message)
        self.silent = tuple(silent)


class CommandHung(ActorTimeout):
    """The command itself has not come to its inbox for too long."""

    def __init__(self, message: str, until: float = 0.0) -> None:
        """`until`: when the process is ended, whatever it still does; by `time.monotonic`."""
        super().__init__(message)
        self.until = until


class ActorLost(RunError):
    """Another process died; the message names it, the call and its log."""


class NodeLost(ActorLost):
    """A node of the cluster has left it or does not answer; the message names what it had, and the way out."""


class AnswerLost(ActorLost):
    """What a call needs, or its answer, is gone with the process that had made it; who was called may be well."""


class RanksLost(ActorLost):
    """A rank of the learner or the critic is lost: all of them have to be started again."""


class RanksSilent(ActorTimeout):
    """The same of ranks that do not answer."""


class RayLost(RunError):
    """A process of Ray's own died, or did not start; the message says which, and how."""


class RewardError(RunError):
    """A reward raised, timed out, or returned the wrong number of values or a value that is not finite."""


class WeightSyncError(RunError):
    """A rollout worker did not prove that it holds the published weights."""


class EngineBroken(WeightSyncError):
    """A load failed in the middle: the engine holds parts of two versions, and its process has to be replaced."""


class DiskError(RunError):
    """A file of the run could not be written; the message names the file and the reason."""


class NoMemory(DiskError):
    """The same of a copy in shared memory, which a run can do without."""
