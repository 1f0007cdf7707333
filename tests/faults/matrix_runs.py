"""Runs of the fault matrix: one config, a run that nobody disturbs, runs that are struck, and what came of a strike."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from conftest import ROOT, Finished, Workplace, end

DRIVER = Path(__file__).with_name("matrix_driver.py")
RESULTS = ROOT / "benchmarks" / "results"
PHASES = ("idle", "generating", "scoring", "push", "checkpoint")
SIGNALS = ("SIGKILL", "SIGSTOP")
STEPS, PROMPTS = 28, 4
HEARTBEAT_S = 5.0
CONFIG = """
include: [{base}]
output: {output}
algo: {{name: ppo, group_size: 4, kl: {{coef: 0.05}}}}
rollout: {{cpus: 1, max_response_tokens: 24}}
learner: {{cpus: 1, keep_state_every: 1, micro_batch_tokens: 1024}}
critic: {{side_by_side: true, optimizer: {{lr: 1e-3, warmup_steps: 2}}}}
reference: {{replicas: 1}}
scoring: {{rewards: {{vowels: {{kind: function, function: "matrix_rewards:vowels"}}}}}}
loop: {{steps: {steps}, prompts_per_step: {prompts}, checkpoint_every: 2}}
eval: {{prompts: 4, every: 0, samples: 1}}
faults: {{heartbeat_s: {heartbeat}, respawns: 100, restarts: 20, backoff_s: 0.2}}
cluster: {{address: local, device: cpu}}
telemetry: {{wandb: "off", samples_every: 0}}
"""
REWARDS = """
import time

def vowels(prompts, responses, answers):
    time.sleep(0.12)  # so that there is a while in which groups are scored
    return [sum(response.count(letter) for letter in "aeiou") / 10 for response in responses]
"""
TIMES = ("time/", "goodput/", "rollout/group_s", "rollout/engine_", "faults/")


@dataclass(frozen=True)
class Struck:
    """A run that was struck; tests change nothing in it."""

    path: Path
    finished: Finished
    found: list[dict[str, Any]]
    """Of each strike: who, phase, how, and seconds until it was noticed, healed, and a step was made."""
    planned: int
    left: list[str]
    """Processes that were there after the end."""


def make_place(folder: Path) -> Workplace:
    folder.mkdir(parents=True, exist_ok=True)
    words = {"base": ROOT / "configs" / "reverse.yaml", "output": folder / "runs", "heartbeat": HEARTBEAT_S}
    (folder / "run.yaml").write_text(CONFIG.format(**words, steps=STEPS, prompts=PROMPTS))
    (folder / "matrix_rewards.py").write_text(REWARDS)
    return Workplace(folder)


def strike(place: Workplace, name: str, strikes: Sequence[dict[str, str]], *words: str) -> Struck:
    """Run to the end, through these strikes, one after the other."""
    (place.folder / "strikes.json").write_text(json.dumps(strikes))
    (place.folder / "struck.jsonl").unlink(missing_ok=True)
    process, run = place.start("train", f"name={name}", *words, program=(str(DRIVER),)), place.output / name
    try:
        finished = place.finish(process)
    finally:
        end(process)
    record = lines(place.folder / "struck.jsonl")
    left = [each.name() for each in psutil.process_iter() if of(place.folder, each)]
    return Struck(run, finished, came_of(record, lines(run / "events.jsonl")), len(strikes), left)


def came_of(record: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds from each strike on; what has not come is None."""
    found = []
    for number, one in enumerate(record):
        if "who" not in one:
            continue
        after = [event for event in events if at(event) > one["time"]]
        noticed = first(after, lambda event, who=one["who"]: notices(event, who))
        healed = first(after, lambda event: event["kind"] in ("returned", "rebuilt", "training_started"))
        since = one["time"] if healed is None else at(healed)
        stepped = next((line["time"] for line in record[number:] if "step" in line and line["time"] > since), None)
        times = {"noticed_s": noticed and at(noticed), "healed_s": healed and at(healed), "step_s": stepped}
        found.append(
            {key: one[key] for key in ("who", "phase", "how")}
            | {key: None if value is None else round(value - one["time"], 2) for key, value in times.items()}
            | {"told": "" if noticed is None else noticed["message"]}
        )
    return found


def notices(event: dict[str, Any], who: str) -> bool:
    """Whether this tells of the loss of the process."""
    if who in ("controller", "raylet"):
        return event["kind"] == "restart"
    return event["kind"] == "warning" and who in event["message"]


def first(events: Sequence[dict[str, Any]], wanted: Any) -> dict[str, Any] | None:
    return next((event for event in events if wanted(event)), None)


def at(event: dict[str, Any]) -> float:
    """Seconds since 1970."""
    return datetime.fromisoformat(event["time"]).timestamp()


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    """Without what is of time."""
    return [
        {key: value for key, value in line.items() if not key.startswith(TIMES)}
        for line in lines(run / "metrics.jsonl")
    ]


def weights(run: Path, step: int) -> bytes:
    return (run / "checkpoints" / f"step-{step}" / "hf" / "model.safetensors").read_bytes()


def of(folder: Path, process: psutil.Process) -> bool:
    try:
        return process.cwd() == str(folder)
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False


def keep(name: str, struck: Struck) -> None:
    """For the table of docs/reliability.md, which `matrix_table.py` prints."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"faults-{name}.json").write_text(json.dumps(struck.found, indent=1))


def shared_memory() -> list[Path]:
    return list(Path("/dev/shm").glob(f"rlhf_dist-{os.getuid()}-*"))
