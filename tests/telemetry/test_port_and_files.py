"""TensorBoard's event files and Prometheus's port, read back as their users do."""

from __future__ import annotations

import importlib.util
import socket
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_dist.config.schema import TelemetryConfig
from rlhf_dist.errors import ConfigError
from rlhf_dist.telemetry.histograms import histogram
from rlhf_dist.telemetry.prometheus_sink import PrometheusSink
from rlhf_dist.telemetry.run_telemetry import open_telemetry, require_sinks
from rlhf_dist.telemetry.tensorboard_sink import TensorBoardSink

ROW = {"prompt": "abc", "response": "c\nba", "reward": 1.0, "components": {"exact": 1.0}}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def test_event_files_and_a_resume_that_goes_back(tmp_path: Path) -> None:
    spread = histogram(np.array([0.0, 1.0, 1.0]))
    assert spread is not None
    first = TensorBoardSink(tmp_path, pytest.fail)
    for step in (1, 2, 3):
        first.log(step, {"reward/mean": step / 4}, {"reward/distribution": spread})
    first.samples(3, [ROW])
    first.close()
    first.log(4, {"reward/mean": 9.0})
    found = events(tmp_path)
    assert [(one.step, one.value) for one in found.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    (drawn, *_) = found.Histograms("reward/distribution")
    assert drawn.histogram_value.bucket == [1.0, 2.0] and drawn.histogram_value.num == 3.0
    assert b"c\n    ba" in found.Tensors("rollouts/samples")[0].tensor_proto.string_val[0]
    again = TensorBoardSink(tmp_path, pytest.fail)
    again.log(2, {"reward/mean": 1.0})
    again.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert [(one.step, one.value) for one in events(tmp_path).Scalars("reward/mean")] == [(1, 0.25), (2, 1.0)]


def test_what_cannot_be_written_is_one_warning(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    sink = TensorBoardSink(tmp_path / "file" / "tensorboard", warnings.append)
    sink.log(1, {"x": 1.0})
    sink.close()
    full = TensorBoardSink(tmp_path, warnings.append)
    full._writer.close()
    full.log(1, {"x": 1.0})
    full.log(2, {"x": 1.0})
    full.close()
    assert [warning.split("(")[0] for warning in warnings] == ["TensorBoard failed "] * 2
    assert capfd.readouterr() == ("", "")


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"telemetry\.tensorboard is true, but .* `pip install tensorboard==2\.21\.0`"
    ):
        require_sinks(TelemetryConfig(wandb="off", tensorboard=True))


def test_a_port_answers_with_the_last_numbers_on_this_machine_alone(tmp_path: Path) -> None:
    port = free_port()
    config = TelemetryConfig(wandb="off", prometheus_port=port)
    require_sinks(config)
    telemetry, _ = open_telemetry(config, tmp_path, 'a "run"', {}, None, lambda _: None)
    telemetry.log(1, {"reward/mean": 0.25, "eval/pass_at_4": 1.0, "kl/reference": float("nan")})
    telemetry.log(2, {"reward/mean": 0.5})
    telemetry.warn("late", "push", "rollout worker 0")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    label = r'run="a \"run\""'
    for line in (
        f"rlhf_reward_mean{{{label}}} 0.5",
        f"rlhf_eval_pass_at_4{{{label}}} 1.0",
        f"rlhf_kl_reference{{{label}}} NaN",
        f"rlhf_step{{{label}}} 2.0",
        f'rlhf_alerts_total{{kind="push",{label}}} 1.0',
    ):
        assert line in lines or line.replace(f'kind="push",{label}', f'{label},kind="push"') in lines, line
    addresses = listening(port)
    telemetry.close()
    telemetry.close()
    assert addresses == {"0100007F"}, "127.0.0.1 as the kernel writes it"
    PrometheusSink(port, "again").close()


def listening(port: int) -> set[str]:
    """Addresses at which something listens on the port, from the kernel's table."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].split(":")[0] for row in rows if int(row[1].split(":")[1], 16) == port and row[3] == "0A"}


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        said = (
            rf"^telemetry\.prometheus_port is {port}, which cannot be used on 127\.0\.0\.1 \(Address already in use\)"
        )
        with pytest.raises(ConfigError, match=said):
            require_sinks(TelemetryConfig(wandb="off", prometheus_port=port))
        with pytest.raises(ConfigError, match=said):
            PrometheusSink(port, "run")
