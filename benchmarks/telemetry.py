"""`rlhf-dist bench telemetry`: what logging costs, as a share of the steps that it is about.

An ordinary run of `configs/reverse.yaml` with every sink on: files, wandb offline, TensorBoard, Prometheus. The run
itself measures the seconds that its controller spends in sinks (`time/log`). wandb's own process works beside the run;
its CPU seconds are read from `/proc`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _processes import ROOT, processes, started
from step import HERE, at_least, machine_facts, save, work_folder

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.checks import check
from rlhf_dist.config.load import load
from rlhf_dist.errors import RunError

CONFIG = ROOT / "configs" / "reverse.yaml"
TARGET_SHARE = 0.02
"""At most, of a step."""
EVERY_S = 0.5
PORT = 19109
OWN = (
    "name=run",
    "telemetry.wandb=offline",
    "telemetry.tensorboard=true",
    f"telemetry.prometheus_port={PORT}",
    "telemetry.progress=plain",
    "loop.checkpoint_every=0",
    "eval.every=0",
    "eval.prompts=16",
)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with work_folder() as folder:
        words = [*OWN, f"output={folder}", f"loop.steps={args.steps}", *args.words]
        check(load(CONFIG, words), "train")
        cpu = watch(words, folder)
        rows = read(folder / "run" / "metrics.jsonl")
    result = summary(rows, args.warmup, cpu)
    print(table(result))
    save(args.out, result | {"config": args.words, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench telemetry",
        usage="rlhf-dist bench telemetry [--steps N] [--warmup N] [--out FILE] [key=value ...]",
        description="Seconds in sinks as a share of a step, all sinks on. Linux only.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over configs/reverse.yaml")
    parser.add_argument("--steps", type=at_least(20), default=60, help="training steps, 20 or more (60)")
    parser.add_argument("--warmup", type=at_least(1), default=3, help="first steps that do not count (3)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"telemetry-{stamp}.json", help="JSON to write")
    return parser.parse_intermixed_args(list(argv))


def watch(words: Sequence[str], folder: Path) -> list[tuple[int, float]]:
    """Run; (steps done, CPU seconds of wandb's process so far) again and again. Raises `RunError` where it fails."""
    log, metrics = folder / "run.log", folder / "run" / "metrics.jsonl"
    found: list[tuple[int, float]] = []
    with started(["train", str(CONFIG), *words], log) as (process, mark):
        while process.poll() is None:
            time.sleep(EVERY_S)
            if metrics.exists():
                found.append((len(metrics.read_bytes().splitlines()) - 1, wandb_cpu(mark)))
    if process.returncode:
        raise RunError(f"the run ended with exit code {process.returncode}; its log: {log}")
    return found


def wandb_cpu(mark: str) -> float:
    """CPU seconds of wandb's own processes; 0 while there are none."""
    ticks = 0
    for folder, _ in processes(mark):
        try:
            if b"wandb" in (folder / "cmdline").read_bytes().split(b"\0")[0]:
                words = (folder / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
                ticks += int(words[11]) + int(words[12])  # in user and in kernel mode
        except OSError:
            continue  # it has just ended
    return ticks / os.sysconf("SC_CLK_TCK")


def read(metrics: Path) -> list[dict[str, float]]:
    """The rows of training steps, in order."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "time/step" in row]


def summary(rows: Sequence[Mapping[str, float]], warmup: int, cpu: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Sums over the steps after `warmup`. A row's `time/log` is of the step before, so the first row's is left out.

    Raises `RunError` where too few steps are left.
    """
    steps, logs = rows[warmup:-1], rows[warmup + 1 :]
    if not steps:
        raise RunError(f"{len(rows)} steps and a warm-up of {warmup}: none is left to measure")
    step_s, log_s = sum(row["time/step"] for row in steps), sum(row["time/log"] for row in logs)
    background = [(done, seconds) for done, seconds in cpu if done >= warmup and seconds]
    beside = 0.0
    if len(background) > 1 and background[-1][0] > background[0][0]:
        spent = background[-1][1] - background[0][1]
        beside = spent / (background[-1][0] - background[0][0])
    mean_s = step_s / len(steps)
    return {
        "steps": len(steps),
        "step_s": mean_s,
        "log_s": log_s / len(logs),
        "log_s_largest": max(row["time/log"] for row in logs),
        "wandb_cpu_s": beside,
        "share": log_s / step_s,
        "wandb_cpu_share": beside / mean_s,
        "reached": {"share": log_s / step_s <= TARGET_SHARE},
        "rows": [{"step_s": a["time/step"], "log_s": b["time/log"]} for a, b in zip(steps, logs, strict=True)],
    }


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    rows = [
        ("a step", result["step_s"], ""),
        ("logging, in its way", result["log_s"], f"{result['share']:8.2%}  (at most {TARGET_SHARE:.0%} asked)"),
        ("the longest", result["log_s_largest"], ""),
        ("CPU of wandb's process, beside it", result["wandb_cpu_s"], f"{result['wandb_cpu_share']:8.2%}"),
    ]
    head = f"mean of {result['steps']} steps".ljust(36) + "ms".rjust(10) + "of a step".rjust(11)
    return "\n".join([head, *(f"{name:36}{1000 * seconds:10.1f}   {rest}".rstrip() for name, seconds, rest in rows)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
