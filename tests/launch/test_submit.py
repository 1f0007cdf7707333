"""`launch/submit.sh` on a real Ray cluster of one node, with a token, on loopback."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from conftest import SharedRun, family
from free_ports import free_port

pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_LIMIT_S = 120.0
JOB_LIMIT_S = 400.0
LOCAL_ONLY = ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_ADDRESS", "RAY_AUTH_TOKEN", "PYTHONPATH")
"""Settings of the other tests' own local Ray, which a cluster's node does not have."""


@dataclass(frozen=True)
class Cluster:
    """A head node."""

    address: str
    """Of its dashboard."""
    environment: dict[str, str]
    """With the token, for whoever wants to submit."""


def answers(cluster: Cluster, token: str) -> bool:
    request = urllib.request.Request(f"{cluster.address}/api/version", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head with a token; stopped by its process, not by `ray stop`, which ends every Ray there is."""
    token = secrets.token_hex(32)
    environment = {key: value for key, value in os.environ.items() if key not in LOCAL_ONLY}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "PATH": f"{BIN}:{os.environ['PATH']}"}
    port = free_port()
    found = Cluster(f"http://127.0.0.1:{port}", environment)
    words = [
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={free_port()}",
        "--num-cpus=2",
        "--num-gpus=0",
    ]
    words += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    words += [
        f"--dashboard-agent-listen-port={free_port()}",
        "--disable-usage-stats",
        f"--ray-client-server-port={free_port()}",
    ]
    head = subprocess.Popen(
        [str(BIN / "ray"), "start", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not answers(found, token):
            if head.poll() is not None:
                pytest.fail(f"ray start ended with {head.returncode}: {head.stdout and head.stdout.read()[-2000:]}")
            assert time.monotonic() < deadline, f"the head did not answer in {START_LIMIT_S:g} s"
            time.sleep(0.5)
        yield found
    finally:
        members = family(head.pid)
        head.terminate()
        _, alive = psutil.wait_procs(members, timeout=20)
        for member in alive:
            member.kill()
        head.wait(30)


def submit(cluster: Cluster, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "launch" / "submit.sh"), *words],
        env=cluster.environment | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=JOB_LIMIT_S,
        stdin=subprocess.DEVNULL,
    )


def test_a_config_runs_as_a_job_on_a_cluster(cluster: Cluster, shared_run: SharedRun, tmp_path: Path) -> None:
    """The shipped config, only smaller: what runs on a laptop runs on a cluster by the same file."""
    output = tmp_path / "shared"
    result = submit(
        cluster,
        str(ROOT / "configs" / "reverse.yaml"),
        f"output={output}",
        "name=job",
        f"model.path={shared_run.workplace.output / 'sft'}",
        "data.task.max_length=3",
        "rollout.max_prompt_tokens=40",
        "rollout.max_response_tokens=8",
        "algo.group_size=4",
        "loop.steps=1",
        "loop.prompts_per_step=4",
        "eval.prompts=4",
        "eval.samples=0",
        "telemetry.wandb=off",
        "cluster.device=cpu",
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "succeeded" in result.stderr and f"run directory: {output / 'job'}\n" in result.stderr
    assert "4 groups issued: 4 trained once" in result.stdout, "the job's output is followed"
    summary = json.loads((output / "job" / "summary.json").read_text())
    assert summary["command"] == "train"
    assert (output / "job" / "checkpoints" / "step-1" / "hf" / "model.safetensors").is_file()


def test_a_wrong_token_is_refused_in_one_sentence(cluster: Cluster) -> None:
    result = submit(cluster, str(ROOT / "configs" / "local.yaml"), RAY_AUTH_TOKEN="0" * 64)
    assert result.returncode == 2
    assert "refuses the token" in result.stderr and "Traceback" not in result.stderr


SMALL = """
name: small
model: {tiny: {hidden_size: 64, intermediate_size: 64, layers: 1, heads: 2, kv_heads: 1}}
sft: {steps: 2, batch_size: 4}
telemetry: {wandb: "off"}
cluster: {device: cpu}
"""


def test_another_command_is_sent_from_a_folder_of_the_users_own(cluster: Cluster, tmp_path: Path) -> None:
    """With the code of the package, which does not lie there. The run directory comes here from the job's folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "small.yaml").write_text(SMALL)
    result = subprocess.run(
        [sys.executable, "-m", "rlhf_dist", "submit", "--env", "PYTHONWARNINGS=seen", "sft", "small.yaml"],
        cwd=folder,
        env=cluster.environment | {"RAY_ADDRESS": cluster.address, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=JOB_LIMIT_S,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "held out" in result.stdout and "run directory:" in result.stdout
    assert "invalid action: 'seen'" in result.stdout, "Python reads the variable in the job"
    copied = folder / "runs" / "small"
    assert "run directory: runs/small, a copy of " in result.stderr and "left there" not in result.stderr
    assert json.loads((copied / "summary.json").read_text())["outcome"] == "finished"
    assert (copied / "checkpoints" / "step-2" / "hf" / "model.safetensors").is_file()


def test_bad_input_that_only_the_cluster_sees_ends_as_it_does_here(cluster: Cluster, tmp_path: Path) -> None:
    words = ["data.source=jsonl", "data.path=/no/such.jsonl", f"output={tmp_path}"]
    result = submit(cluster, "--env", "PYTHONWARNINGS=seen", "sft", str(ROOT / "configs" / "reverse.yaml"), *words)
    assert result.returncode == 2
    assert "invalid action: 'seen'" in result.stdout, "launch/submit.sh passes the variable on"
    assert "data.path is '/no/such.jsonl', which does not exist" in result.stdout
