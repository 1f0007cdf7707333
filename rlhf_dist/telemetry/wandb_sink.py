"""Weights & Biases as a sink: metrics and histograms over the training step, a table of samples, alerts."""

from __future__ import annotations

import json
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import numpy as np

from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.telemetry.alerts import AlertKind, level_of, title_of
from rlhf_dist.telemetry.code_version import code_version
from rlhf_dist.telemetry.histograms import Histogram
from rlhf_dist.telemetry.sinks import NONE, FragileSink, SampleRow, json_safe, one_line
from rlhf_dist.telemetry.wandb_key import wandb_mode, why_offline

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
SAMPLES = "rollouts/samples"
COLUMNS = ("step", "prompt", "response", "reward", "components")
TABLE_ROWS = 200
"""The most that the table of samples has; all of them are in the files of the run directory."""
ALERT_CHARACTERS = 2000
"""Of an alert's text; a failure's message may end with lines of a log."""
DATA_DIR = "WANDB_DATA_DIR"


class WandbSink(FragileSink):
    """Offline by itself when there is no key or no network.

    It never stops or blocks the run: the first failure is told once and the sink falls silent. The step is an ordinary
    column named `step`, because wandb drops rows whose own step counter goes backwards, as it does after a resume.
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
        on_note: Callable[[str], None],
    ) -> None:
        """`resume_id`: `run_id` of the run being continued, None for a new one. Files go to `run_directory`/wandb.

        `on_note` hears why the run is offline, `on_failure` what went wrong. Raises ConfigError as `wandb_mode` does.
        """
        super().__init__("wandb", on_failure)
        self.run_id: str | None = resume_id
        """Keep it, to continue the same wandb run after a resume; None when wandb is off or did not start."""
        self._run: Any = None
        self._rows: deque[tuple[int, str, str, float, str]] = deque(maxlen=TABLE_ROWS)
        self._folder = ""
        mode = wandb_mode(config)
        self._works = mode != "off"
        if mode == "off":
            return
        why = why_offline(config, mode)
        if "WANDB_DATA_DIR" not in os.environ:  # else tables that are not uploaded yet lie outside the run directory
            os.environ[DATA_DIR] = self._folder = str(run_directory / "wandb")
        for attempt in ["online", "offline"] if mode == "online" and not why else ["offline"]:
            try:
                self._run = _start_wandb(config, run_directory, name, config_dict, resume_id, attempt)
                self.run_id = str(self._run.id)
                break
            except Exception as error:
                self._works = attempt == "online"
                instead = "going on offline" if attempt == "online" else "going on without it"
                on_failure(f"wandb did not start {attempt} ({one_line(error)}); {instead}")
        if self._run is not None and why:
            on_note(f"wandb is offline, {why}; upload the run later with `wandb sync {Path(self._run.dir).parent}`")

    def log(self, step: int, metrics: Mapping[str, float], histograms: Mapping[str, Histogram] = NONE) -> None:
        def send() -> None:
            import wandb

            drawn = {
                name: wandb.Histogram(np_histogram=(np.array(found.counts), np.array(found.edges)))
                for name, found in histograms.items()
            }
            self._run.log({"step": int(step)} | dict(metrics) | drawn)

        self._attempt(send)

    def alert(self, kind: AlertKind, text: str, subject: str) -> None:
        """wandb sends the same title twice in a second once; so each cause has its own."""
        title, level, short = title_of(kind, subject), level_of(kind), text[:ALERT_CHARACTERS]
        self._attempt(lambda: self._run.alert(title=title, text=short, level=level, wait_duration=1))

    def samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """The table `rollouts/samples`: these rows and those before, the last `TABLE_ROWS`."""

        def send() -> None:
            import wandb

            for row in rows:
                components = json.dumps(json_safe({k: float(v) for k, v in row["components"].items()}))
                self._rows.append((int(step), row["prompt"], row["response"], float(row["reward"]), components))
            table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in self._rows])
            self._run.log({"step": int(step), SAMPLES: table})

        if rows:
            self._attempt(send)

    def close(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            self._attempt(run.finish)
        self._works = False
        if self._folder and os.environ.get(DATA_DIR) == self._folder:
            del os.environ[DATA_DIR]


def without_secrets(value: Any) -> Any:
    """A config as plain values, in which no address, also within a text, keeps user or query: they may hold a token."""
    if isinstance(value, Mapping):
        return {key: without_secrets(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(inner) for inner in value]
    return ADDRESS.sub(lambda found: _plain_address(found[0]), value) if isinstance(value, str) else value


def _plain_address(address: str) -> str:
    try:
        parts = urlsplit(address)
    except ValueError:
        return "(an address that cannot be read)"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


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
        config=without_secrets(config_dict) | {"code": code_version()},
        id=resume_id,
        resume="allow" if resume_id else None,
        mode="online" if mode == "online" else "offline",
        settings=wandb.Settings(
            silent=True,
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,  # `code` has the commit of this package; wandb would take that of the current folder
            init_timeout=WandbSink.START_LIMIT_S,
            finish_timeout=WandbSink.FINISH_LIMIT_S,
        ),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    return run
