import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.errors import DiskError
from rlhf_dist.telemetry import sinks, wandb_key, wandb_sink
from rlhf_dist.telemetry.run_telemetry import Telemetry

ROWS = [
    {"prompt": "abc", "response": "cba", "reward": 1.0, "components": {"exact": 1.0}},
    {"prompt": "def", "response": "d\udc80", "reward": 0.0, "components": {"exact": 0.0, "format": 1.0}, "uid": "0/1"},
]


def read_lines(path: Path) -> list[dict[str, object]]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_imports_need_no_torch_and_no_heavy_library() -> None:
    code = (
        "import sys; from rlhf_dist.telemetry import display, metrics, report, run_telemetry, timeline\n"
        "print([m for m in ('torch', 'wandb', 'matplotlib', 'rich', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_metrics_are_valid_json_at_once_step_first_also_when_not_finite(tmp_path: Path) -> None:
    sink = sinks.JsonlSink(tmp_path / "metrics.jsonl")
    sink.log(1, {"reward/mean": 0.5, "a": math.nan, "b": math.inf, "c": -math.inf})
    (line,) = read_lines(tmp_path / "metrics.jsonl")  # Before close: nothing waits in a buffer.
    assert next(iter(line)) == "step" and line == {"step": 1, "reward/mean": 0.5, "a": "nan", "b": "inf", "c": "-inf"}
    assert math.isnan(float("nan")) and float(str(line["c"])) == -math.inf
    sink.close()


def test_a_line_torn_by_a_crash_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    sink = sinks.JsonlSink(path)
    sink.log(2, {"x": 1.0})
    sink.close()
    assert path.read_text() == '{"step": 1}\n{"ste\n{"step": 2, "x": 1.0}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_no_disk_left_names_file_and_reason() -> None:
    sink = sinks.JsonlSink(Path("/dev/full"))
    with pytest.raises(DiskError, match=r"^/dev/full: cannot be written: No space left on device$"):
        sink.log(1, {"x": 1.0})
    sink.close()


def test_metrics_are_on_the_disk_before_a_checkpoint_relies_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    files = [sinks.JsonlSink(tmp_path / "metrics.jsonl"), sinks.EventLog(tmp_path / "events.jsonl")]
    telemetry = Telemetry(files, lambda _: None)
    telemetry.log(1, {"a": 1.0})
    assert flushed == [], "not at each step"
    telemetry.keep()
    assert flushed == [str(tmp_path / "metrics.jsonl")]

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written: No space left on device"):
        telemetry.keep()


def test_a_directory_that_is_not_there_is_a_disk_error(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written: No such file"):
        sinks.JsonlSink(tmp_path / "no" / "metrics.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"step-000001\.parquet: cannot be written"):
        sinks.SampleFiles(tmp_path / "file").samples(1, ROWS[:1])


def test_events_keep_time_kind_message_and_facts(tmp_path: Path) -> None:
    log = sinks.EventLog(tmp_path / "events.jsonl")
    log.event("fault", "worker-1 died", worker="worker-1", log=Path("logs/worker-1.log"), values=[math.nan])
    log.close()
    (line,) = read_lines(tmp_path / "events.jsonl")
    assert line["kind"] == "fault" and line["message"] == "worker-1 died" and str(line["time"]).endswith("+00:00")
    assert line["facts"] == {"worker": "worker-1", "log": "logs/worker-1.log", "values": ["nan"]}


def test_samples_become_parquet_with_every_column(tmp_path: Path) -> None:
    rows = [ROWS[0], {**ROWS[1], "response": "d"}]
    sinks.SampleFiles(tmp_path / "rollouts").samples(10, rows)
    table = pq.read_table(tmp_path / "rollouts" / "step-000010.parquet").to_pylist()
    assert [file.name for file in (tmp_path / "rollouts").iterdir()] == ["step-000010.parquet"]
    assert table[0]["reward/exact"] == 1.0 and table[0]["reward/format"] is None and table[0]["uid"] is None
    assert table[1]["reward/format"] == 1.0 and table[1]["uid"] == "0/1" and table[1]["step"] == 10


class BrokenRun:
    def finish(self) -> None:
        raise ConnectionError("the service is gone")

    def log(self, metrics: object) -> None:
        raise ConnectionError("the service\nis gone")


def test_a_failing_wandb_is_one_warning_and_never_stops_the_run(tmp_path: Path) -> None:
    warnings: list[str] = []
    sink = wandb_sink.WandbSink(TelemetryConfig(wandb="off"), tmp_path, "x", {}, None, warnings.append, print)
    sink._run, sink._works = BrokenRun(), True
    sink.log(1, {"a": 1.0})
    sink.log(2, {"a": 1.0})
    sink.samples(2, ROWS)
    sink.close()
    assert warnings == ["wandb failed (ConnectionError: the service is gone); going on without it"]


def test_a_wandb_that_dies_at_the_end_is_one_warning_and_every_sink_is_closed(tmp_path: Path) -> None:
    warnings: list[str] = []

    class Stuck(sinks.Sink):
        def close(self) -> None:
            raise OSError("stuck")

    files = [sinks.JsonlSink(tmp_path / "metrics.jsonl"), sinks.EventLog(tmp_path / "events.jsonl")]
    local = Telemetry(files, warnings.append)
    wandb = wandb_sink.WandbSink(TelemetryConfig(wandb="off"), tmp_path, "x", {}, None, local.warn, print)
    wandb._run, wandb._works = BrokenRun(), True
    Telemetry([*files, wandb, Stuck()], warnings.append).close()
    told = "wandb failed (ConnectionError: the service is gone); going on without it"
    assert warnings == ["Stuck did not close (OSError: stuck)", told]
    assert [line["message"] for line in read_lines(tmp_path / "events.jsonl")] == [told]
    assert all(file._lines._file.closed for file in files), "the local files are closed too"


def test_a_wandb_that_cannot_start_online_goes_offline_then_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> object:
        raise TimeoutError("no answer")

    monkeypatch.setattr(wandb_sink, "_start_wandb", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key-" + "x" * 40)
    monkeypatch.setattr(wandb_key, "unreachable", lambda: "")
    warnings: list[str] = []
    sink = wandb_sink.WandbSink(TelemetryConfig(wandb="online"), tmp_path, "x", {}, None, warnings.append, print)
    sink.log(1, {"a": 1.0})
    assert sink.run_id is None
    assert [warning.rsplit("; ", 1)[1] for warning in warnings] == ["going on offline", "going on without it"]
    assert "not-a-real-key" not in "".join(warnings)
