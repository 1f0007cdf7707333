"""How often a run has lost processes, and healed: counted from its events, over all of its starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LOSSES = "faults/losses"
"""Processes that were lost so far, or did what they must not: warnings of kind `fault`."""
RESPAWNS = "faults/respawns"
"""Rollout workers and servers that were started again so far, and are ready."""
REBUILDS = "faults/rebuilds"
"""Times so far that the ranks of the learner and the critic were started again together."""
RESTARTS = "faults/restarts"
"""Times so far that `--supervise` has started the run again."""
RECOVER = "faults/recover_s"
"""Seconds so far until a learner that was lost was ready again, and from the end of a start until the next trained."""
HEALED = ("returned", "rebuilt")
"""Kinds of events that say that a process is ready again."""
COUNTED = {"returned": RESPAWNS, "rebuilt": REBUILDS, "restart": RESTARTS}


class FaultTally:
    """The counts, to which each event is added as it comes."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = dict.fromkeys((LOSSES, RESPAWNS, REBUILDS, RESTARTS, RECOVER), 0.0)
        self._stopped: tuple[datetime, str] | None = None
        """When the start before this one ended, and how; None once this one trains."""

    @classmethod
    def of(cls, events: Path) -> FaultTally:
        """Of an events.jsonl. A line that cannot be read, as the last of a run that was killed, counts for nothing."""
        tally = cls()
        try:
            lines = events.read_bytes().splitlines()
        except OSError:
            return tally
        for line in lines:
            try:
                found = json.loads(line)
                when = datetime.fromisoformat(found["time"])
                tally.add(str(found["kind"]), str(found["message"]), dict(found["facts"]), when)
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return tally

    def add(self, kind: str, message: str, facts: Mapping[str, Any], when: datetime | None = None) -> None:
        """Count an event. Raises TypeError or ValueError for one that is damaged."""
        when = datetime.now(UTC) if when is None else when
        if kind == "warning" and facts.get("alert") == "fault":
            self._counts[LOSSES] += 1
        if kind in COUNTED:
            self._counts[COUNTED[kind]] += 1
        if kind == "rebuilt":
            self._counts[RECOVER] += float(facts.get("seconds", 0.0))
        if kind == "restart":
            self._stopped = when, message
        if kind == "training_started" and self._stopped is not None:
            self._counts[RECOVER] += max(0.0, (when - self._stopped[0]).total_seconds())
            self._stopped = None

    @property
    def started_again(self) -> str:
        """How the start before this one ended, where the run was started again and does not train yet; else empty."""
        return "" if self._stopped is None else self._stopped[1]

    def metrics(self) -> dict[str, float]:
        """By name; nothing in a run without a fault."""
        return dict(self._counts) if any(self._counts.values()) else {}

    def line(self) -> str:
        """For a person; empty in a run without a fault."""
        if not any(self._counts.values()):
            return ""
        count = {name: int(value) for name, value in self._counts.items()}
        return (
            f"faults: {count[LOSSES]}; started again: workers and servers {count[RESPAWNS]}x, the learner "
            f"{count[REBUILDS]}x, the run {count[RESTARTS]}x; {self._counts[RECOVER]:.0f} s without training"
        )
