"""What a run directory tells of its run, read for a report; what cannot be read is named with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rlhf_dist.config.schema import Config, RewardSpec
from rlhf_dist.errors import DataError, InputError
from rlhf_dist.loop.run_end import FINISHED, OUTCOME
from rlhf_dist.loop.saved_config import flat, saved_config
from rlhf_dist.loop.shown_answers import AFTER, BEFORE, Answers, Said, ShownAnswer, read_answers
from rlhf_dist.loop.state import fits
from rlhf_dist.models.guarded_files import read_json, read_regular
from rlhf_dist.telemetry import names
from rlhf_dist.telemetry.fault_tally import FaultTally
from rlhf_dist.telemetry.report import Series, is_drawn, read_metrics
from rlhf_dist.telemetry.sinks import EVENTS_FILE, METRICS_FILE
from rlhf_dist.telemetry.wandb_sink import without_secrets

T = TypeVar("T")

LARGEST = 1 << 28
"""Bytes of the events that are read."""
MOST = 1 << 53
"""A number of a config that is beyond it counts as none."""
TOLD = ("warning", "failed", "stopped", "restart", "returned", "rebuilt", "resume", "early_stop")
"""Kinds of events that a report lists."""
MOST_EVENTS = 20
REWARDS = "scoring.rewards."


@dataclass(frozen=True, slots=True)
class Events:
    """What happened to a run."""

    told: tuple[tuple[str, str, str], ...] = ()
    """(time, kind, message) of the first of those that are listed."""
    more: int = 0
    """How many further ones there are."""
    begun: str = ""
    """Time of the first event."""
    faults: str = ""
    """Losses and healings in a sentence; empty without any."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run. A part that is missing is empty, and `gaps` says why."""

    path: Path
    config: Mapping[str, Any]
    """Key -> value of its config.yaml, without what an address may hide."""
    changed: Mapping[str, Any]
    """Of these, what is not at its default."""
    summary: Mapping[str, Any]
    series: Series
    events: Events
    before: Answers | None
    after: Answers | None
    gaps: Mapping[str, str] = field(default_factory=dict)
    """File -> why it tells nothing."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def command(self) -> str:
        found = self.summary.get("command")
        return found if isinstance(found, str) else ""

    @property
    def outcome(self) -> str:
        """In words."""
        if not self.summary:
            return "no end is recorded: it is under way, or was killed"
        found = self.summary.get(OUTCOME, FINISHED)
        why = self.summary.get("message")
        if found == FINISHED or not why:
            return str(found)
        return str(why) if str(why).startswith(str(found)) else f"{found}: {why}"

    def metrics(self, when: str) -> dict[str, float]:
        """Held-out results `before` or `after`."""
        return metrics_of(self.summary.get(when))

    def number(self, key: str) -> float:
        """A number of the config; 0 where there is none."""
        found = self.config.get(key)
        return float(found) if isinstance(found, int | float) and abs(found) < MOST else 0.0


def metrics_of(found: Any) -> dict[str, float]:
    """Numbers by name, as a summary has them; nothing where it is something else."""
    return {name: float(found[name]) for name in found} if fits(found, dict[str, float]) else {}


def is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in (METRICS_FILE, "summary.json"))


def read_run(path: Path) -> RunFacts:
    """Raises InputError where there is no run directory; every other problem is a gap."""
    if not is_run(path):
        raise InputError(f"{path}: is no run directory, for it has neither {METRICS_FILE} nor summary.json")
    gaps: dict[str, str] = {}

    def part(name: str, read: Callable[[], T], empty: T) -> T:
        try:
            return read()
        except DataError as error:
            gaps[name] = str(error).removeprefix(f"{path / name}: ")
            return empty

    config = part("config.yaml", lambda: saved_config(path / "config.yaml"), {})
    summary = part("summary.json", lambda: _mapping(path / "summary.json"), {})
    series = part(METRICS_FILE, lambda: _series(path / METRICS_FILE), {})
    events = part(EVENTS_FILE, lambda: _events(path / EVENTS_FILE), Events())
    older = _greedy_only(summary)
    before, after = (part(f"answers/{n}", lambda n=n: read_answers(path, n), older.get(n)) for n in (BEFORE, AFTER))
    told = without_secrets(config)
    return RunFacts(path, told, _changed(told), summary, series, events, before, after, gaps)


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that are not at their default; of a reward, but for its kind, those of any reward."""
    defaults = flat(asdict(Config()))
    of_reward = flat(asdict(RewardSpec(kind="exact")))

    def at_default(key: str, value: object) -> bool:
        if key.startswith(REWARDS):
            own = key.removeprefix(REWARDS).partition(".")[2]
            return own != "kind" and own in of_reward and of_reward[own] == value
        return key in defaults and defaults[key] == value

    return {key: value for key, value in config.items() if not at_default(key, value)}


def _mapping(path: Path) -> dict[str, Any]:
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: is not the summary of a run")
    return found


def _series(path: Path) -> Series:
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path}: is not there" if not path.exists() else f"{path}: is no file")
    return read_metrics(path, lambda name: is_drawn(name) or name == names.REWARD_PROXY)


def _events(path: Path) -> Events:
    told: list[tuple[str, str, str]] = []
    begun = ""
    for line in read_regular(path, LARGEST).splitlines():
        try:
            found = json.loads(line)
            time, kind, message = (str(found[name]) for name in ("time", "kind", "message"))
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # As the last line of a run that was killed.
        begun = begun or time
        if kind in TOLD:
            told.append((time, kind, message))
    return Events(tuple(told[:MOST_EVENTS]), len(told[MOST_EVENTS:]), begun, FaultTally.of(path).line())


def _greedy_only(summary: Mapping[str, Any]) -> dict[str, Answers]:
    """File -> the few greedy answers of a summary, for a run of a version that kept no others."""
    found = summary.get("answers")
    if not isinstance(found, dict) or not fits(found, dict[str, list[str]]):
        return {}
    step = summary.get("step")
    made = {}
    for name, when, at in ((BEFORE, "before", 0), (AFTER, "after", step if isinstance(step, int) else 0)):
        pairs = zip(found.get("prompts", []), found.get(when, []), strict=False)
        rows = tuple(ShownAnswer(prompt, Said(text, None)) for prompt, text in pairs)
        made |= {name: Answers(at, rows)} if rows else {}
    return made
