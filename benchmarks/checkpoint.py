"""`rlhf-dist bench checkpoint`: seconds of a step that is followed by a checkpoint, over those of one that is not.

Two runs of `configs/reverse.yaml`'s sizes take the same steps, bit for bit; one of them writes a checkpoint after each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from _processes import started
from step import HERE, at_least, machine_facts, save

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.errors import RunError
from rlhf_dist.telemetry import names

LIMIT_S = 600.0
"""For each run."""
TARGET = 1.1
"""At most."""
SETTINGS = (
    "rollout.workers=1",
    "eval.prompts=4",
    "eval.every=0",
    "telemetry.wandb=off",
    "telemetry.samples_every=0",
)
SIDES = {"without": "loop.checkpoint_every=0", "with": "loop.checkpoint_every=1"}


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    seconds: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for number in range(args.runs):
        for side, key in SIDES.items():
            print(f"run {number + 1} of {args.runs}, {side} checkpoints", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="rlhf-bench-") as folder:
                found = step_seconds(Path(folder), (key, f"loop.steps={args.steps + args.warmup + 1}"))
            seconds[side].append(found[args.warmup :])
    result = summary(seconds)
    print(table(result))
    save(args.out, result | {"machine": machine_facts()})
    return 0


def step_seconds(folder: Path, keys: Sequence[str]) -> list[float]:
    """From the end of each step to the end of the next one, with all that lies between; without the last step.

    Raises `RunError`.
    """
    log = folder / "run.log"
    words = ["train", "configs/reverse.yaml", f"output={folder / 'runs'}", "name=checkpoint", *SETTINGS, *keys]
    with started(words, log) as (process, _):
        if process.wait(LIMIT_S):
            raise RunError(f"the run failed: {log.read_text(encoding='utf-8')[-1000:]}")
    run = folder / "runs" / "checkpoint"
    if "training waits" in log.read_text(encoding="utf-8"):
        raise RunError("there was no memory for checkpoints beside the steps")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ends = [line[names.ELAPSED] for line in lines if names.ELAPSED in line]
    return [after - before for before, after in pairwise(ends)][:-1]


def summary(seconds: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    """Medians over all steps of all runs, and their ratio."""
    medians = {side: statistics.median([one for run in runs for one in run]) for side, runs in seconds.items()}
    ratio = medians["with"] / medians["without"]
    return {"seconds": seconds, "median_s": medians, "ratio": ratio, "reached": ratio <= TARGET}


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    found = [f"{side + ' a checkpoint':<24}{result['median_s'][side]:>8.3f} s a step" for side in SIDES]
    met = "reached" if result["reached"] else "missed"
    return "\n".join([*found, f"ratio {result['ratio']:.3f}, at most {TARGET:g} asked, {met}"])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises `InputError`."""
    parser = Parser(prog="rlhf-dist bench checkpoint", description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=at_least(1), default=10, help="that are measured, of each run (10)")
    parser.add_argument("--warmup", type=at_least(1), default=2, help="steps before them (2)")
    parser.add_argument("--runs", type=at_least(1), default=2, help="of each side, in turn (2)")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"checkpoint-{stamp}.json", help="JSON file")
    return parser.parse_args(list(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
