"""Which machine a run plans for, when it joins a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

from rlhf_dist.cluster import session
from rlhf_dist.cluster.processes import ENDED, stat
from rlhf_dist.cluster.session import nodes_of_cluster, ray_session
from rlhf_dist.config.schema import ClusterConfig
from rlhf_dist.errors import RunError
from rlhf_dist.planning.placement import Machine


@pytest.mark.parametrize(
    ("resources", "machine"),
    [({"CPU": 4.0}, Machine(4, 0, "a")), ({"CPU": 8.0, "GPU": 2.0}, Machine(8, 2, "a")), ({}, Machine(0, 0, "a"))],
)
def test_a_node_has_what_ray_says(resources: dict[str, float], machine: Machine) -> None:
    assert nodes_of_cluster([{"Alive": True, "Resources": resources, "NodeManagerAddress": "a"}], "a") == (machine,)


def test_a_joined_cluster_is_planned_for_by_its_living_nodes_the_commands_own_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = [(True, 12.0, "10.0.0.1"), (True, 8.0, "10.0.0.2"), (False, 96.0, "10.0.0.3")]
    seen: dict[str, Any] = {}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(ray, "init", lambda **settings: seen.update(settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    listed = [{"Alive": alive, "Resources": {"CPU": cpus}, "NodeManagerAddress": at} for alive, cpus, at in nodes]
    monkeypatch.setattr(ray, "nodes", lambda: listed)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    with ray_session(ClusterConfig(address="auto"), tmp_path / "logs", pytest.fail) as found:
        assert found == (Machine(8, 0, "10.0.0.2"), Machine(12, 0, "10.0.0.1"))
    assert seen["address"] == "auto" and "_temp_dir" not in seen, "a cluster has its own folder"


@dataclass
class FakeRay:
    """What stands for Ray's start and end, and what it was told."""

    settings: dict[str, Any] = field(default_factory=dict)
    tmpdir: str = ""
    ended: int = 0
    error: Exception | None = None

    def init(self, **settings: Any) -> None:
        self.settings, self.tmpdir = settings, os.environ["TMPDIR"]
        Path(settings["_temp_dir"]).chmod(0o777)  # as Ray does
        logs = Path(settings["_temp_dir"]) / "session_latest" / "logs"
        logs.mkdir(parents=True)
        (logs / "raylet.out").write_bytes(b"old" + b"x" * 2**20 + b"why")
        (logs / "gcs_server.out").write_text(f"token {os.environ['RAY_AUTH_TOKEN']}")
        (logs / "worker-1.out").write_text("a user's own output")
        if self.error:
            raise self.error

    def shutdown(self) -> None:
        self.ended += 1


@pytest.fixture
def fake_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRay:
    fake = FakeRay()
    for name in ("init", "shutdown"):
        monkeypatch.setattr(ray, name, getattr(fake, name))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session, "temporary_parent", lambda _: (tmp_path, "it is elsewhere"))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("TMPDIR", "/as-it-was")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


def test_a_local_ray_and_its_workers_keep_their_files_in_a_private_folder(fake_ray: FakeRay, tmp_path: Path) -> None:
    told: list[str] = []
    with ray_session(ClusterConfig(), tmp_path / "logs", told.append):
        folder = Path(fake_ray.settings["_temp_dir"]).parent
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        assert fake_ray.tmpdir == str(folder / "tmp") and (folder / "tmp").is_dir()
        assert os.environ["TMPDIR"] == "/as-it-was", "this process goes on with its own"
    assert list(tmp_path.iterdir()) == [] and fake_ray.ended == 1 and told == ["it is elsewhere"]


@pytest.mark.parametrize("when", ["at the start", "in a step"])
def test_after_a_failure_the_logs_of_rays_own_processes_are_kept_without_secrets(
    fake_ray: FakeRay, tmp_path: Path, when: str
) -> None:
    logs = tmp_path / "logs" / "ray"

    def run() -> None:
        with ray_session(ClusterConfig(), logs, print):
            raise RunError("a worker died")

    fake_ray.error = OSError("AF_UNIX\npath too long") if when == "at the start" else None
    told = "Ray did not start: AF_UNIX path too long" if fake_ray.error else "a worker died"
    with pytest.raises(RunError, match=f"^{told}"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"] and fake_ray.ended == 1
    assert [path.name for path in logs.iterdir()] == ["raylet.out"]
    data = (logs / "raylet.out").read_bytes()
    assert len(data) == 2**20 and data.endswith(b"why") and (logs / "raylet.out").stat().st_mode & 0o777 == 0o600


def test_an_interrupted_run_keeps_no_logs_and_no_folder(fake_ray: FakeRay, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), ray_session(ClusterConfig(), tmp_path / "logs", print):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [] and fake_ray.ended == 1


def test_an_interrupt_that_is_no_signal_ends_ray_in_its_own_way(fake_ray: FakeRay, tmp_path: Path) -> None:
    """Whoever raised it may catch it, and go on with another session."""
    with pytest.raises(KeyboardInterrupt), ray_session(ClusterConfig(), tmp_path / "logs", print):
        raise KeyboardInterrupt
    assert fake_ray.ended == 1


def test_an_interrupted_run_kills_what_belongs_to_its_ray_and_nothing_else(
    fake_ray: FakeRay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's own way to end takes seconds, for which somebody waits at the keyboard."""
    started: list[subprocess.Popen[str]] = []
    parent = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"

    def run() -> None:
        with ray_session(ClusterConfig(), tmp_path / "logs", print):
            for mark in (fake_ray.settings["_temp_dir"], "of wandb"):
                words = [sys.executable, "-c", parent, mark]
                started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            workers.extend(int(process.stdout.readline()) for process in started if process.stdout)
            monkeypatch.setattr(session.signals, "has_come", lambda: True)
            raise KeyboardInterrupt

    workers: list[int] = []
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
        known = [stat(pid) for pid in workers]
        assert [each is not None and each.state not in ENDED for each in known] == [False, True]
        assert started[0].wait(10) == -signal.SIGKILL and started[1].poll() is None
    finally:
        for pid in (*workers, *(process.pid for process in started)):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for process in started:
            process.communicate()
