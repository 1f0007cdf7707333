"""Files for clusters, seen by what can check them without one: shellcheck, hadolint, Ray's schema."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_dist.cluster import node_wait

ROOT = Path(__file__).resolve().parents[2]
LAUNCH, BIN = ROOT / "launch", Path(sys.executable).parent
LIMIT_S = 60
NODE_FIELDS = {"rayStartParams": dict, "template": dict}
FIELDS: dict[str, dict[str, type]] = {
    "job": {
        "entrypoint": str,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": dict,
    },
    "cluster": {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list},
    "head": NODE_FIELDS,
    "workers": NODE_FIELDS | {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int},
    "pod": {"securityContext": dict, "containers": list, "volumes": list},
    "container": {"name": str, "image": str, "env": list, "resources": dict, "volumeMounts": list},
}
"""Of KubeRay's RayJob, version v1, what the file uses."""


def checked(*words: str) -> None:
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_shell_scripts() -> None:
    scripts = [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"]
    assert len(scripts) > 6
    checked(str(BIN / "shellcheck"), *map(str, scripts))


def test_images() -> None:
    checked(str(BIN / "hadolint"), *map(str, (ROOT / "docker").glob("*.Dockerfile")))


def test_the_cluster_launchers_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((LAUNCH / "cluster.yaml").read_text())
    whole = prepare_config(config)
    validate_config(whole)
    with pytest.raises(Exception, match="head_node"):
        validate_config(whole | {"head_node": {}})
    assert config["head_node_type"] in config["available_node_types"]
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"], *config["setup_commands"]]
    for script in re.findall(r"~/rlhf_dist/(launch/\w+\.sh)", " ".join(commands)):
        assert (ROOT / script).is_file()
    assert (
        "~/.ray/auth_token" in config["file_mounts"] and "ray_cluster.sh head" in config["head_start_ray_commands"][-1]
    )


def only(found: dict[str, Any], what: str) -> dict[str, Any]:
    """`found`, which has the fields of `FIELDS` and no other."""
    assert {name: type(value) for name, value in found.items()}.items() <= FIELDS[what].items(), what
    return found


def test_the_rayjob() -> None:
    text = (LAUNCH / "kuberay_job.yaml").read_text()
    made = yaml.safe_load(text)
    assert (made["apiVersion"], made["kind"]) == ("ray.io/v1", "RayJob")
    job = only(made["spec"], "job")
    cluster = only(job["rayClusterSpec"], "cluster")
    pins = (LAUNCH / "requirements-gpu.txt").read_text()
    assert f"ray=={cluster['rayVersion']}\n" in pins and cluster["authOptions"] == {"mode": "token"}
    groups = [
        only(cluster["headGroupSpec"], "head"),
        *(only(group, "workers") for group in cluster["workerGroupSpecs"]),
    ]
    for group in groups:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = only(group["template"]["spec"], "pod")
        assert pod["securityContext"]["runAsUser"] == 1000, "the user of the images"
        (container,) = (only(each, "container") for each in pod["containers"])
        mounts, volumes = ({each["name"] for each in part} for part in (container["volumeMounts"], pod["volumes"]))
        assert mounts == volumes
        gpus = {amounts["nvidia.com/gpu"] for amounts in container["resources"].values()}
        assert gpus == {"8"} and all(isinstance(one, str) for one in gpus)
    program, command, config, *overrides = job["entrypoint"].split()
    assert (program, command) == ("rlhf-dist", "train") and "output=/shared/runs" in overrides
    assert (ROOT / config.removeprefix("/home/rlhf/rlhf_dist/")).is_file()


STAND_INS = {
    "srun": """#!/usr/bin/env bash
node=here
while [[ ${1:-} == --* ]]; do [[ $1 != --nodelist=* ]] || node=${1#*=}; shift; done
echo "$node: $*" >>calls
[[ $1 != hostname ]] || { echo 10.1.1.1; exit; }
case "$*" in
  *--block*) exec sleep 60 ;;
  *fails*) exit 2 ;;
  *waits*) sleep 60 & trap 'kill %1; exit 143' TERM; touch runs; wait; exit 0 ;;
esac
""",
    "scontrol": "#!/bin/sh\nprintf 'n1\\nn2\\n'\n",
    "python": """#!/bin/sh
[ $1 = -m ] || { echo secret; exit; }
until [ "$(grep -c -- --block calls)" -ge $4 ]; do sleep 0.05; done
echo wait $3 $4 >>calls
""",
}


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """A checkout with stand-ins for Slurm, Python and Ray."""
    (tmp_path / "launch").mkdir()
    shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "launch")
    for name, text in STAND_INS.items():
        path = tmp_path / (".venv/bin/python" if name == "python" else f"fake/{name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    (tmp_path / "launch" / "ray_cluster.sh").write_text("")
    (tmp_path / "launch" / "ray_cluster.sh").chmod(0o755)
    return tmp_path


def start(slurm: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(slurm), "SLURM_JOB_NODELIST": "n[1-2]"}
    base = {"PATH": f"{slurm / 'fake'}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "8"}
    return subprocess.Popen(
        ["bash", str(slurm / "launch" / "slurm.sbatch"), *words],
        env=base | job | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("name", "code"), [("well", 0), ("fails", 2)])
def test_the_slurm_job_makes_a_cluster_and_passes_the_exit_code_on(slurm: Path, name: str, code: int) -> None:
    job = start(slurm, "train", "configs/x.yaml", f"name={name}")
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == code, err
    assert sorted((slurm / "calls").read_text().splitlines()) == [
        "n1: env RAY_ADDRESS=10.1.1.1:20014 .venv/bin/rlhf-dist train configs/x.yaml name=" + name,
        "n1: hostname --all-ip-addresses",
        "n1: launch/ray_cluster.sh head --block --address 10.1.1.1 --port 20014 --dashboard-port 20015 -- --num-cpus=8",
        "n2: launch/ray_cluster.sh worker 10.1.1.1:20014 --block -- --num-cpus=8",
        "wait 10.1.1.1:20014 1",
        "wait 10.1.1.1:20014 2",
    ]


def test_the_slurm_job_passes_the_signal_before_the_time_limit_on(slurm: Path) -> None:
    job = start(slurm, "train", "configs/x.yaml", "name=waits")
    while not (slurm / "runs").exists():
        assert job.poll() is None, job.communicate()
    job.terminate()
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == 143


@pytest.mark.parametrize(
    ("words", "environment", "told"),
    [
        (["train"], {}, "name a command and a config"),
        (["train", "x"], {"SLURM_JOB_ID": ""}, "this is a batch file: sbatch"),
        (["train", "x"], {"SLURM_SUBMIT_DIR": "/tmp"}, "call sbatch in the checkout"),
    ],
)
def test_bad_input_to_the_slurm_job(slurm: Path, words: list[str], environment: dict[str, str], told: str) -> None:
    job = start(slurm, *words, **environment)
    _, err = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 2 and told in err


def test_nodes_that_do_not_come_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(node_wait, "POLL_S", 0.01)
    monkeypatch.setattr(node_wait, "greet", lambda *_: "")
    monkeypatch.setattr(node_wait, "living", lambda _: ["10.0.0.1", "10.0.0.2"])
    assert node_wait.main(["10.0.0.1:6379", "2", "5"]) == 0
    assert node_wait.main(["10.0.0.1:6379", "3", "0.05"]) == 1
    assert "not ready in 0.05 s: 2 of 3 nodes are there: 10.0.0.1, 10.0.0.2" in capsys.readouterr().err
