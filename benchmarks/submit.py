"""`rlhf-dist bench submit`: seconds from sending a job to a cluster to its first optimizer step.

A Ray cluster of one node with a token, on loopback, by `launch/ray_cluster.sh`; then `rlhf-dist submit train
configs/reverse.yaml` from the tiny model, as it ships. The cluster's own start does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _processes import ROOT
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.errors import RunError

TARGET_S = 40.0
"""At most."""
LIMIT_S = 300.0
SCRIPT = ROOT / "launch" / "ray_cluster.sh"
SIGNS = ("submitted", "run directory", "first step")
"""What is waited for, in order."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder, cluster(Path(folder)) as environment:
        runs = []
        for run in range(args.runs):
            print(f"job {run + 1} of {args.runs}", file=sys.stderr, flush=True)
            runs.append(one_job(Path(folder), f"job-{run}", environment))
    result = summary(runs)
    print(table(result))
    save(args.out, result | {"machine": machine_facts()})
    return 0


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A head; yields the environment of who submits to it. Raises `RunError`."""
    home = folder / "home"
    home.mkdir()
    ray = Path(sys.executable).parent / "ray"
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = own | {"HOME": str(home), "RAY": str(ray), "PYTHONPATH": str(ROOT)}
    head, dashboard = free_port(), free_port()
    where = ["--address", "127.0.0.1", "--port", str(head), "--dashboard-port", str(dashboard)]
    started = subprocess.run(
        [str(SCRIPT), "head", *where], env=environment, capture_output=True, text=True, check=False
    )
    if started.returncode:
        raise RunError(f"the cluster did not start: {started.stderr.strip()[-500:]}")
    try:
        yield environment | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        subprocess.run([str(SCRIPT), "stop"], env=environment, capture_output=True, check=False)


def free_port() -> int:
    """Above those of Ray's workers, and below those that the system gives out by itself and others may take first."""
    while True:
        try:
            with socket.create_server(("127.0.0.1", random.randrange(20000, 32000))) as probe:
                return probe.getsockname()[1]
        except OSError:
            continue


def one_job(folder: Path, name: str, environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds from the command until each of `SIGNS`. Raises `RunError`."""
    run, log = folder / "runs" / name, folder / f"{name}.log"
    keys = [f"output={folder / 'runs'}", f"name={name}", "loop.steps=1", "telemetry.wandb=off"]
    words = [sys.executable, "-m", "rlhf_dist", "submit", "train", "configs/reverse.yaml", *keys]
    found: dict[str, float] = {}
    with log.open("w", encoding="utf-8") as file:
        begun = time.monotonic()
        job = subprocess.Popen(words, cwd=ROOT, env=dict(environment), stdout=file, stderr=subprocess.STDOUT)
        try:
            while len(found) < len(SIGNS):
                seen = signs(log.read_text(encoding="utf-8"), run)
                found |= {sign: time.monotonic() - begun for sign in seen if sign not in found}
                ended = job.poll()
                if (ended or time.monotonic() - begun > LIMIT_S) and len(found) < len(SIGNS):
                    raise RunError(f"the job took no step: {log.read_text(encoding='utf-8')[-1000:]}")
                time.sleep(0.05)
            job.wait(LIMIT_S)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait(60)
    return found


def signs(log: str, run: Path) -> list[str]:
    """Those of `SIGNS` that can be seen."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    stepped = any(line.endswith("}") and json.loads(line)["step"] >= 1 for line in lines)
    return [sign for sign, there in zip(SIGNS, ("submitted" in log, run.exists(), stepped), strict=True) if there]


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians over the runs."""
    middle = {sign: statistics.median(run[sign] for run in runs) for sign in SIGNS}
    return {"seconds": middle, "reached": {"first step": middle["first step"] <= TARGET_S}, "runs": list(runs)}


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{'from the command to':<20}{'s':>8}"]
    lines += [f"{sign:<20}{result['seconds'][sign]:>8.1f}" for sign in SIGNS]
    met = "reached" if result["reached"]["first step"] else "missed"
    return "\n".join([*lines, f"first step: at most {TARGET_S:g} s asked, {met}"])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises `InputError`."""
    parser = Parser(prog="rlhf-dist bench submit", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--runs", type=at_least(1), default=3, help="jobs, of which the median counts")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"submit-{stamp}.json", help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
