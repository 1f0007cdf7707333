"""What is recorded when a process misses a limit: the progress of all processes, and the stacks of the silent ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rlhf_dist.errors import ActorTimeout
from rlhf_dist.loop.healing import Healing, unwatched
from rlhf_dist.loop.ports import Arrivals
from rlhf_dist.telemetry.run_telemetry import Telemetry

FOLDER = "faults"
"""In the run directory."""
EVENT = "late"
Stacks = Callable[[Sequence[str]], Mapping[str, str]]
"""Names of processes -> where each is, in text; takes some seconds at most."""
Report = Callable[[str, Sequence[str]], str]
"""(the limit that was missed, by whom; nobody: it may be any) -> where the report is, to be appended to the message."""


def no_report(why: str, silent: Sequence[str]) -> str:
    """Of a run that writes none."""
    return ""


class Waiting(Arrivals, Protocol):
    """Where processes are waited for."""

    report: Report


class LateReports:
    """Of one run: an event for each, with the progress of all, and a file with stacks."""

    def __init__(self, telemetry: Telemetry, directory: Path, stacks: Stacks) -> None:
        self._telemetry, self._directory, self._stacks = telemetry, directory, stacks
        self._healing = unwatched()
        self._clock: Arrivals | None = None

    def watch(self, healing: Healing, arrivals: Waiting) -> None:
        """The processes of the run, and where the run waits for them: a limit that is missed there is reported, too."""
        self._healing, self._clock = healing, arrivals
        arrivals.report = self.report

    def report(self, why: str, silent: Sequence[str]) -> str:
        """See `Report`. Takes the stacks of those that are silent, or of all."""
        try:
            stacks = self._stacks(silent or self._healing.names)
        except Exception as error:  # Whatever it is, the run has to go on with what it does about the silence.
            stacks = {"no stacks": f"{type(error).__name__}: {error}"}
        place, problem = self._write(why, stacks)
        members = {} if self._clock is None else self._healing.progress(self._clock.now())
        facts = {"silent": list(silent), "members": members, "stacks": place}
        self._telemetry.event(EVENT, why, **facts, **({"problem": problem} if problem else {}))
        return f"; stacks: {place}" if place else ""

    @contextmanager
    def at_the_end(self) -> Iterator[None]:
        """Around the whole run: one that ends because a process did not answer has a report, too."""
        try:
            yield
        except ActorTimeout as error:
            error.args = (f"{error}{self.report(str(error), error.silent)}",)
            raise

    def _write(self, why: str, stacks: Mapping[str, str]) -> tuple[str, str]:
        """(the file, why there is none); the first that is not there yet."""
        text = "\n\n".join([why, *(f"==== {name} ====\n{found}" for name, found in stacks.items())])
        folder = self._directory / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            path = folder / f"stacks-{len(list(folder.glob('stacks-*.txt'))) + 1}.txt"
            with path.open("x", encoding="utf-8", errors="replace") as file:
                file.write(text + "\n")
        except OSError as error:  # The run itself reports a full disk where it needs one.
            return "", f"{folder}: {error.strerror or error}"
        return str(path), ""
