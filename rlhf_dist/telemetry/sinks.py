"""Where metrics, events and samples go: JSON lines, sample tables in parquet, Weights & Biases, or all of them.

loop -> Telemetry -+-> JsonlSink    metrics.jsonl              a failure stops the run (DiskError)
                   +-> EventLog     events.jsonl               a failure stops the run (DiskError)
                   +-> SampleFiles  rollouts/step-N.parquet    a failure stops the run (DiskError)
                   +-> WandbSink    wandb/                     a failure is one warning, the run goes on
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.errors import DiskError
from rlhf_dist.telemetry.wandb_key import wandb_mode

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"
ROLLOUTS_FOLDER = "rollouts"

SampleRow = Mapping[str, Any]
"""One sampled response: `prompt` and `response` (str), `reward` (float), `components` (reward name -> float), and
whatever else is worth a column (str, int, float)."""


class Sink(Protocol):
    """Takes what a run says about itself."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one optimizer step (0: before the first)."""
        ...

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """Something that happened: `warning`, `fault`, `restart`, `checkpoint` ..., in words and in facts."""
        ...

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """A few responses of one step."""
        ...

    def close(self) -> None:
        """Flush and let go; may be called twice."""
        ...


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

    def close(self) -> None:
        self._file.close()


def _json_safe(value: Any) -> Any:
    """JSON has no NaN or infinity: they become the strings "nan", "inf" and "-inf", which Python's float() reads."""
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class JsonlSink:
    """One JSON object a step, `step` first. Values are numbers, or "nan", "inf", "-inf" where JSON has no number.

    Raises DiskError naming the file and the reason.
    """

    def __init__(self, path: Path) -> None:
        self._lines = _LineFile(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: _json_safe(float(value)) for name, value in metrics.items() if name != "step"}
        self._lines.append({"step": int(step)} | values)

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """Not kept here."""

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Not kept here."""

    def close(self) -> None:
        self._lines.close()


class EventLog:
    """One JSON object an event: time (ISO 8601, UTC), kind, message, facts. Raises DiskError."""

    def __init__(self, path: Path) -> None:
        self._lines = _LineFile(path)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Not kept here."""

    def event(self, kind: str, message: str, **facts: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._lines.append({"time": now, "kind": kind, "message": message, "facts": _json_safe(facts)})

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Not kept here."""

    def close(self) -> None:
        self._lines.close()


class SampleFiles:
    """`FOLDER/step-000010.parquet`, one row a response; components become columns `reward/NAME`. Raises DiskError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Not kept here."""

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """Not kept here."""

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

    def close(self) -> None:
        """Every table is complete when it is written."""


def _flatten(row: SampleRow) -> dict[str, Any]:
    flat = {name: value for name, value in row.items() if name != "components"}
    return flat | {f"reward/{name}": float(value) for name, value in row.get("components", {}).items()}


class WandbSink:
    """Metrics and sample tables to Weights & Biases, offline by itself when there is no key.

    It never stops or blocks the run: the first failure is told once through `on_failure` and the sink falls silent
    (a failed online start first falls back to offline). The step is an ordinary column named `step`, because wandb
    drops rows whose own step counter goes backwards, as it does after a resume.
    """

    START_LIMIT_S = 30.0
    FINISH_LIMIT_S = 60.0

    def __init__(
        self,
        config: TelemetryConfig,
        run_directory: Path,
        name: str,
        config_dict: Mapping[str, Any],
        resume_id: str | None,
        on_failure: Callable[[str], None],
    ) -> None:
        """`resume_id`: `run_id` of the run being continued, None for a new one. Files go to `run_directory`/wandb.

        Raises ConfigError as `wandb_mode` does.
        """
        self.run_id: str | None = resume_id
        """Keep it, to continue the same wandb run after a resume; None when wandb is off or did not start."""
        self._on_failure = on_failure
        self._run: Any = None
        mode = wandb_mode(config)
        if mode == "off":
            return
        attempts = ["online", "offline"] if mode == "online" else ["offline"]
        for attempt in attempts:
            try:
                self._run = _start_wandb(config, run_directory, name, config_dict, resume_id, attempt)
                self.run_id = str(self._run.id)
                return
            except Exception as error:
                instead = "going on offline" if attempt == "online" else "going on without it"
                on_failure(f"wandb did not start {attempt} ({_one_line(error)}); {instead}")

    def _attempt(self, call: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            self._on_failure(f"wandb failed ({_one_line(error)}); going on without it")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._attempt(lambda: self._run.log({"step": int(step)} | dict(metrics)))

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """Not sent: events are for whoever looks after this run."""

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """The table `rollouts/samples` of this step: step, prompt, response, reward, components (as JSON)."""

        def send() -> None:
            import wandb

            table = wandb.Table(columns=["step", "prompt", "response", "reward", "components"])
            for row in rows:
                components = json.dumps(_json_safe({k: float(v) for k, v in row["components"].items()}))
                table.add_data(int(step), row["prompt"], row["response"], float(row["reward"]), components)
            self._run.log({"step": int(step), "rollouts/samples": table})

        self._attempt(send)

    def close(self) -> None:
        self._attempt(lambda: self._run.finish())
        self._run = None


def _start_wandb(
    config: TelemetryConfig,
    run_directory: Path,
    name: str,
    config_dict: Mapping[str, Any],
    resume_id: str | None,
    mode: str,
) -> Any:
    # It advertises another product over the user's screen when the process has certain libraries loaded.
    os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
    import wandb

    run = wandb.init(
        project=config.project,
        entity=config.entity or None,
        dir=str(run_directory),
        name=name,
        config=dict(config_dict),
        id=resume_id,
        resume="allow" if resume_id else None,
        mode="online" if mode == "online" else "offline",
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            init_timeout=WandbSink.START_LIMIT_S,
            finish_timeout=WandbSink.FINISH_LIMIT_S,
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


class Telemetry:
    """All sinks as one. A warning is an event of kind `warning` that is also shown at once, through `on_warning`."""

    def __init__(self, sinks: Sequence[Sink], on_warning: Callable[[str], None]) -> None:
        self._sinks = tuple(sinks)
        self._on_warning = on_warning
        self.last_step: int | None = None
        """The last step that was logged."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.last_step = step
        for sink in self._sinks:
            sink.log(step, metrics)

    def event(self, kind: str, message: str, **facts: Any) -> None:
        for sink in self._sinks:
            sink.event(kind, message, **facts)

    def warn(self, message: str, **facts: Any) -> None:
        self._on_warning(message)
        self.event("warning", message, **facts)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        for sink in self._sinks:
            sink.samples(step, rows)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_telemetry(
    config: TelemetryConfig,
    run_directory: Path,
    name: str,
    config_dict: Mapping[str, Any],
    wandb_id: str | None,
    on_warning: Callable[[str], None],
) -> tuple[Telemetry, str | None]:
    """All sinks of a run, and the wandb run's id (None without wandb), to be given back as `wandb_id` on resume.

    Raises DiskError when the run directory cannot be written, ConfigError as `wandb_mode` does.
    """
    events = EventLog(run_directory / EVENTS_FILE)
    files: list[Sink] = [JsonlSink(run_directory / METRICS_FILE), events, SampleFiles(run_directory / ROLLOUTS_FOLDER)]
    local = Telemetry(files, on_warning)
    wandb_sink = WandbSink(config, run_directory, name, config_dict, wandb_id, on_failure=local.warn)
    return Telemetry([*files, wandb_sink], on_warning), wandb_sink.run_id
