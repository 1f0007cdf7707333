"""All sinks of a run as one, and their start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.telemetry.alerts import AlertKind, AlertLimit
from rlhf_dist.telemetry.fault_tally import HEALED, FaultTally
from rlhf_dist.telemetry.histograms import Histogram
from rlhf_dist.telemetry.prometheus_sink import PrometheusSink, require_port
from rlhf_dist.telemetry.sinks import (
    EVENTS_FILE,
    METRICS_FILE,
    NONE,
    ROLLOUTS_FOLDER,
    EventLog,
    JsonlSink,
    SampleFiles,
    SampleRow,
    Sink,
    one_line,
)
from rlhf_dist.telemetry.tensorboard_sink import FOLDER, TensorBoardSink, require_tensorboard
from rlhf_dist.telemetry.wandb_key import wandb_mode
from rlhf_dist.telemetry.wandb_sink import WandbSink


class Telemetry:
    """All sinks as one. A warning is an event of kind `warning` that is also shown at once, through `on_warning`."""

    def __init__(
        self, sinks: Sequence[Sink], on_warning: Callable[[str], None], tally: FaultTally | None = None
    ) -> None:
        """`tally`: of the events of earlier starts, if there were any."""
        self._sinks = tuple(sinks)
        self._on_warning = on_warning
        self._tally = FaultTally() if tally is None else tally
        self._alerts = AlertLimit()
        self._seconds = 0.0
        self.last_step: int | None = None
        """The last step that was logged."""

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] = NONE) -> None:
        """The metrics, and with them how often the run has lost processes and healed."""
        self.last_step = step
        with self._timed():
            for sink in self._sinks:
                sink.log(step, {**metrics, **self._tally.metrics()}, histograms)

    def event(self, kind: str, message: str, **facts: Any) -> None:
        """A process that is ready again is told to people, too."""
        self._tally.add(kind, message, facts)
        with self._timed():
            for sink in self._sinks:
                sink.event(kind, message, **facts)
        if kind in HEALED:
            self.alert("healed", message, message.partition(" is ready again")[0])

    def warn(self, message: str, alert: AlertKind | None = None, subject: str = "", **facts: Any) -> None:
        """`alert`: the kind of what people are to be called for, too; `subject`: whom it is about."""
        self._on_warning(message)
        self.event("warning", message, **facts, **({} if alert is None else {"alert": alert}))
        if alert is not None:
            self.alert(alert, message, subject)

    def alert(self, kind: AlertKind, text: str, subject: str = "") -> None:
        """Call people, once in a while for one cause, which is the kind and `subject`; no line in the event log."""
        if not self._alerts.lets(kind, subject):
            return
        with self._timed():
            for sink in self._sinks:
                sink.alert(kind, text, subject)

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        with self._timed():
            for sink in self._sinks:
                sink.samples(step, rows)

    def keep(self) -> None:
        """See `Sink.keep`."""
        with self._timed():
            for sink in self._sinks:
                sink.keep()

    def spent(self) -> float:
        """Seconds in the sinks since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """The local files last, for they take what others say at their end. What fails is told and hides nothing."""
        for sink in reversed(self._sinks):
            try:
                sink.close()
            except Exception as error:
                self._on_warning(f"{type(sink).__name__} did not close ({one_line(error)})")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - begun


def require_sinks(config: TelemetryConfig) -> None:
    """Refuse, before anything starts, what no sink can be made of. Raises ConfigError."""
    wandb_mode(config)
    if config.tensorboard:
        require_tensorboard()
    if config.prometheus_port:
        require_port(config.prometheus_port)


def open_telemetry(
    config: TelemetryConfig,
    run_directory: Path,
    name: str,
    config_dict: Mapping[str, Any],
    wandb_id: str | None,
    on_warning: Callable[[str], None],
    on_note: Callable[[str], None] = lambda _: None,
) -> tuple[Telemetry, str | None]:
    """All sinks of a run, and the wandb run's id (None without wandb), to be given back as `wandb_id` on resume.

    Raises DiskError when the run directory cannot be written, ConfigError as `require_sinks` does.
    """
    events = EventLog(run_directory / EVENTS_FILE)
    files: list[Sink] = [JsonlSink(run_directory / METRICS_FILE), events, SampleFiles(run_directory / ROLLOUTS_FOLDER)]
    local = Telemetry(files, on_warning)

    def note(message: str) -> None:
        on_note(message)
        local.event("telemetry", message)

    wandb_sink = WandbSink(config, run_directory, name, config_dict, wandb_id, local.warn, note)
    sinks: list[Sink] = [*files, wandb_sink]
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_directory / FOLDER, local.warn))
    if config.prometheus_port:
        sinks.append(PrometheusSink(config.prometheus_port, name))
    tally = FaultTally.of(run_directory / EVENTS_FILE)
    telemetry = Telemetry(sinks, on_warning, tally)
    if tally.started_again:
        telemetry.alert("restart", tally.started_again)
    return telemetry, wandb_sink.run_id
