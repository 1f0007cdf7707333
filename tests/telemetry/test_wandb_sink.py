"""What a real offline run of wandb holds, read back from its file."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wandb_records import config, history, of_kind, records

import rlhf_dist
from rlhf_dist.config.schema import Config, RewardSpec, ScoringConfig, TelemetryConfig
from rlhf_dist.telemetry import wandb_key, wandb_sink
from rlhf_dist.telemetry.fault_tally import LOSSES, REBUILDS, RECOVER, RESPAWNS, RESTARTS
from rlhf_dist.telemetry.histograms import histogram
from rlhf_dist.telemetry.run_telemetry import Telemetry, open_telemetry
from rlhf_dist.telemetry.sinks import EventLog
from rlhf_dist.telemetry.wandb_key import unreachable

SECRET = "hunter2"
ROW = {"prompt": "abc", "response": "cba", "reward": 1.0, "components": {"exact": 1.0}}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "WANDB_DIR", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")


def opened(folder: Path, wandb_id: str | None, notes: list[str]) -> tuple[Telemetry, str]:
    rewards = {"judge": RewardSpec(kind="http", url=f"https://me:{SECRET}@judge.example.org/score?token={SECRET}")}
    whole = asdict(Config(scoring=ScoringConfig(rewards)))
    warned: list[str] = []
    telemetry, found = open_telemetry(TelemetryConfig(), folder, "tiny", whole, wandb_id, warned.append, notes.append)
    assert found is not None and warned == []
    return telemetry, found


def test_an_offline_run_read_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run, notes = tmp_path / "run", list[str]()
    run.mkdir()
    telemetry, wandb_id = opened(run, None, notes)
    spread = histogram(np.array([0.0, 1.0, 1.0]))
    assert spread is not None
    for step in (1, 2):
        telemetry.log(step, {"reward/mean": 0.25 * step}, {"reward/distribution": spread})
        telemetry.samples(step, [ROW])
    for _ in range(3):
        telemetry.warn("step 2: the KL explodes", "kl")
    for name in ("rollout worker 0", "rollout worker 1"):
        telemetry.alert("push", f"{name} did not load version 2 in 5 s", name)
    telemetry.warn("rollout worker 0 was killed; it is started again", "fault", "rollout worker 0")
    telemetry.event("returned", "rollout worker 0 is ready again")
    telemetry.event("rebuilt", "the learner is ready again after 7 s", seconds=7.0)
    telemetry.close()
    parent = EventLog(run / "events.jsonl")
    parent.event("restart", "a node lost at step 2")
    parent.close()
    again, same = opened(run, wandb_id, notes)
    again.log(3, {"reward/mean": 0.75})
    again.close()
    assert capfd.readouterr() == ("", ""), "wandb spoke over the user's screen"
    assert len(notes) == 2 and "wandb is offline, there is no wandb key" in notes[0] and "`wandb sync " in notes[0]
    first, second = sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert same == wandb_id and first.stem == second.stem == f"run-{wandb_id}"
    check(records(first))
    (row,) = history(records(second))
    faults = {LOSSES: 1.0, RESPAWNS: 1.0, REBUILDS: 1.0, RESTARTS: 1.0, RECOVER: 7.0}
    assert (row["step"], row["reward/mean"]) == (3, 0.75) and faults.items() <= row.items()
    told = [(alert.title, alert.text, alert.level) for alert in of_kind(records(second), "alert")]
    assert told == [("The run was started again", "a node lost at step 2", "ERROR")]
    assert SECRET.encode() not in first.read_bytes()
    staged = [path for path in (run / "wandb" / "artifacts").rglob("*") if path.is_file()]
    assert staged, "tables that wait for an upload are in the run directory"
    alerts = [json.loads(line)["facts"].get("alert") for line in (run / "events.jsonl").read_text().splitlines()]
    assert alerts.count("kl") == 3, "the event log has every warning"
    assert not any(name.startswith("faults/") for row in history(records(first)) for name in row), "there were none yet"


def check(found: list[Any]) -> None:
    """Of the first start of the run."""
    defined = of_kind(found, "metric")
    assert [(metric.glob_name, metric.step_metric) for metric in defined if metric.glob_name] == [("*", "step")]
    rows = history(found)
    assert [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row] == [(1, 0.25), (2, 0.5)]
    assert rows[0]["reward/distribution"] == {"_type": "histogram", "bins": [-0.5, 0.5, 1.5], "values": [1, 2]}
    tables = [row["rollouts/samples"] for row in rows if "rollouts/samples" in row]
    assert [(table["_type"], table["nrows"]) for table in tables] == [
        ("table-file", 1),
        ("table-file", 2),
    ]
    parts = [Path(entry.local_path) for one in of_kind(found, "artifact") for entry in one.manifest.contents]
    rows_sent = [[row[0] for row in json.loads(part.read_text())["data"]] for part in parts]
    assert rows_sent == [[1], [1, 2]], "each table is whole"
    told = [(alert.title, alert.text, alert.level) for alert in of_kind(found, "alert")]
    assert told == [
        ("KL explosion", "step 2: the KL explodes", "WARN"),
        *(
            (f"A worker missed a weight push: {name}", f"{name} did not load version 2 in 5 s", "ERROR")
            for name in ("rollout worker 0", "rollout worker 1")
        ),
        ("A fault: rollout worker 0", "rollout worker 0 was killed; it is started again", "ERROR"),
        ("Ready again: rollout worker 0", "rollout worker 0 is ready again", "INFO"),
        ("Ready again: the learner", "the learner is ready again after 7 s", "INFO"),
    ]
    given = config(found)
    assert given["code"]["version"] == rlhf_dist.__version__ and given["algo"]["name"] == "grpo"
    assert given["scoring"]["rewards"]["judge"]["url"] == "https://judge.example.org/score"
    assert of_kind(found, "stats"), "what the machine did"


def test_the_table_of_samples_stops_growing(tmp_path: Path) -> None:
    class Kept:
        def log(self, values: dict[str, Any]) -> None:
            tables.append([row[0] for row in values["rollouts/samples"].data])

    tables: list[list[int]] = []
    sink = wandb_sink.WandbSink(TelemetryConfig(wandb="off"), tmp_path, "x", {}, None, print, print)
    sink._run, sink._works = Kept(), True
    for step in (1, 2, 3):
        sink.samples(step, [ROW] * 90)
    sink.samples(4, [])
    assert tables == [[1] * 90, [1] * 90 + [2] * 90, [1] * 20 + [2] * 90 + [3] * 90], "the latest 200"


def test_a_key_without_a_network_goes_offline_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "local-" + "0123456789" * 4)
    monkeypatch.setattr(wandb_key, "unreachable", lambda: f"127.0.0.1:{port} cannot be reached")
    run, notes = tmp_path / "run", list[str]()
    run.mkdir()
    telemetry, _ = opened(run, None, notes)
    telemetry.close()
    assert [f"wandb is offline, 127.0.0.1:{port} cannot be reached" in note for note in notes] == [True]
    assert list((run / "wandb").glob("offline-run-*"))


def test_a_server_is_looked_for_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk import wandb_setup

    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    monkeypatch.setattr(wandb_setup.singleton().settings, "base_url", f"http://127.0.0.1:{port}")
    with server:
        assert unreachable() == ""
    assert unreachable() == "127.0.0.1 cannot be reached (Connection refused)"

    def late(*_: object) -> socket.socket:
        time.sleep(0.5)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", late)
    assert unreachable(0.05) == "127.0.0.1 did not answer within 0.05 s"


def test_an_address_keeps_neither_user_nor_query() -> None:
    given = {"a": [f"http://u:{SECRET}@h:1/p?k={SECRET}#x", "no address"], "b": {"c": 1, "d": "https://h/p"}}
    assert wandb_sink.without_secrets(given) == {
        "a": ["http://h:1/p", "no address"],
        "b": {"c": 1, "d": "https://h/p"},
    }
    rubric = f"Is it right? Sources such as https://u:{SECRET}@h/p?k={SECRET} are good. Ten points?"
    assert wandb_sink.without_secrets(rubric) == "Is it right? Sources such as https://h/p are good. Ten points?"
