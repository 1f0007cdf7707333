"""What a sink is, and those that write files of the run: JSON lines, and sample tables in parquet.

loop -> Telemetry -+-> JsonlSink        metrics.jsonl              a failure stops the run (DiskError)
                   +-> EventLog         events.jsonl               a failure stops the run (DiskError)
                   +-> SampleFiles      rollouts/step-N.parquet    a failure stops the run (DiskError)
                   +-> WandbSink        wandb/                     a failure is one warning, the run goes on
                   +-> TensorBoardSink  tensorboard/               a failure is one warning, the run goes on
                   +-> PrometheusSink   a port                     keeps the last step's numbers in memory
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf_dist.errors import DiskError
from rlhf_dist.telemetry.alerts import AlertKind
from rlhf_dist.telemetry.histograms import Histogram

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
ROLLOUTS_FOLDER = "rollouts"
NONE: Mapping[str, Histogram] = MappingProxyType({})

SampleRow = Mapping[str, Any]
"""One sampled response: `prompt` and `response` (str), `reward` (float), `components` (reward name -> float), and
whatever else is worth a column (str, int, float)."""


class Sink:
    """Takes what a run says about itself. Each kind takes what it can show, and leaves the rest."""

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] = NONE) -> None:
        """Metrics of one training step (0: before the first)."""

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """Something that happened: `warning`, `fault`, `restart`, `checkpoint` ..., in words and in facts."""

    def alert(self, kind: AlertKind, text: str, subject: str) -> None:
        """Something that people are to be called for; `subject`: whom it is about, or empty."""

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """A few responses of one step."""

    def keep(self) -> None:
        """Put on the disk what a resume from the checkpoint that is about to be written relies on."""

    def close(self) -> None:
        """Flush and let go; may be called twice."""


class _LineFile:
    """Appends whole lines, unbuffered: after each call the line is in the file, whatever happens to the process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("a+b", buffering=0)
            self._end_torn_line()
        except OSError as error:
            raise DiskError(f"{path}: cannot be written: {error.strerror}") from error

    def _end_torn_line(self) -> None:
        """A process that died while writing left half a line: the next one must not continue it."""
        size = os.fstat(self._file.fileno()).st_size
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")

    def append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False, ensure_ascii=False, default=str) + "\n"
        data = line.encode("utf-8", errors="backslashreplace")
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise DiskError(f"{self._path}: cannot be written: {error.strerror}") from error

    def keep(self) -> None:
        """Whatever happens to the machine."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DiskError(f"{self._path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        self._file.close()


def json_safe(value: Any) -> Any:
    """JSON has no NaN or infinity: they become the strings "nan", "inf" and "-inf", which Python's float() reads."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class JsonlSink(Sink):
    """One JSON object a step, `step` first. Values are numbers, or "nan", "inf", "-inf" where JSON has no number.

    Raises DiskError naming the file and the reason.
    """

    def __init__(self, path: Path) -> None:
        self._lines = _LineFile(path)

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] = NONE) -> None:
        values = {name: json_safe(float(value)) for name, value in metrics.items() if name != "step"}
        self._lines.append({"step": int(step)} | values)

    def keep(self) -> None:
        self._lines.keep()

    def close(self) -> None:
        self._lines.close()


class EventLog(Sink):
    """One JSON object an event: time (ISO 8601, UTC), kind, message, facts. Raises DiskError."""

    def __init__(self, path: Path) -> None:
        self._lines = _LineFile(path)

    def event(self, kind: str, message: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append({"time": now, "kind": kind, "message": message, "facts": json_safe(facts)})

    def close(self) -> None:
        self._lines.close()


class SampleFiles(Sink):
    """`FOLDER/step-000010.parquet`, one row a response; components become columns `reward/NAME`. Raises DiskError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        if not rows:
            return
        import pyarrow as pa
        from pyarrow import parquet

        flat = [{"step": int(step)} | _flatten(row) for row in rows]
        # One column for every key of any row: pyarrow by itself looks at the first row only.
        names = list(dict.fromkeys(name for row in flat for name in row))
        table = pa.table({name: [row.get(name) for row in flat] for name in names})
        path = self._folder / f"step-{step:06d}.parquet"
        unfinished = path.with_suffix(".parquet.tmp")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, unfinished)
            os.replace(unfinished, path)
        except OSError as error:
            raise DiskError(f"{path}: cannot be written: {error.strerror or error}") from error


def _flatten(row: SampleRow) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name != "components"}
    return flat | {f"reward/{name}": float(value) for name, value in row.get("components", {}).items()}


class FragileSink(Sink):
    """One that must never stop or block a run: its first failure is told once, and it falls silent."""

    def __init__(self, what: str, on_failure: Callable[[str], None]) -> None:
        self._what = what
        self._on_failure = on_failure
        self._works = True

    def _attempt(self, call: Callable[[], object]) -> None:
        if not self._works:
            return
        try:
            call()
        except Exception as error:
            self._works = False
            self._on_failure(f"{self._what} failed ({one_line(error)}); going on without it")


def one_line(error: BaseException) -> str:
    """An error's kind and message, cut for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
