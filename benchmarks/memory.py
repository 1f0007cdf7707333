"""`rlhf-dist bench memory`: host memory of all processes of a run over several hundred steps.

An ordinary run on reversing words. Every few seconds the proportional share (PSS: what processes share is counted once)
of each of its processes is read from `/proc`, Ray's own too, and told by the step that the run had reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from _processes import processes, started
from step import HERE, at_least, machine_facts, save, work_folder

from rlhf_dist.cli.arguments import Parser
from rlhf_dist.config.checks import check
from rlhf_dist.config.load import load
from rlhf_dist.errors import RunError

EVERY_S = 4.0
SETTLED_STEP = 50
"""Growth counts from here."""
TARGET_GROWTH = 0.02
"""At most."""
CONFIG: dict[str, Any] = {
    "name": "run",
    "model": {"path": "tiny"},
    "data": {"source": "task", "task": {"name": "reverse", "min_length": 3, "max_length": 5}},
    "algo": {"name": "grpo", "group_size": 8},
    "rollout": {"max_prompt_tokens": 64, "max_response_tokens": 16, "kv_cache_gib": 0.0625},
    "learner": {"micro_batch_tokens": 4096},
    "loop": {"prompts_per_step": 8, "checkpoint_every": 50},
    "eval": {"prompts": 32, "every": 50, "samples": 4},
    "telemetry": {"wandb": "off", "progress": "plain"},
}


@dataclass(frozen=True, slots=True)
class Sample:
    """What the processes held at one moment."""

    step: int
    """Training steps done."""
    mib: Mapping[str, float]
    """Kind of process -> MiB."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with work_folder() as folder:
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(CONFIG | {"output": str(folder)}), encoding="utf-8")
        words = [f"loop.steps={args.steps}", *args.words]
        check(load(path, words), "train")
        samples = watch(path, words, folder)
    result = summary(samples, args.steps)
    print(table(result))
    save(args.out, result | {"config": args.words, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    parser = Parser(
        prog="rlhf-dist bench memory",
        usage="rlhf-dist bench memory [--steps N] [--out FILE] [key=value ...]",
        description="Host memory of all processes of a run over several hundred steps. Linux only.",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="key=value", help="keys set over the benchmark's config")
    parser.add_argument(
        "--steps",
        type=at_least(2 * SETTLED_STEP),
        default=300,
        help=f"training steps, {2 * SETTLED_STEP} or more (300)",
    )
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parser.add_argument("--out", type=Path, default=HERE / "results" / f"memory-{stamp}.json", help="JSON to write")
    return parser.parse_intermixed_args(list(argv))


def watch(config: Path, words: Sequence[str], folder: Path) -> list[Sample]:
    """Run, and look at its processes until it ends. Raises `RunError` where it fails."""
    log = folder / "run.log"
    samples: list[Sample] = []
    with started(["train", str(config), *words], log) as (process, mark):
        while process.poll() is None:
            time.sleep(EVERY_S)
            step = steps_done(folder / "run" / "metrics.jsonl")
            if step:
                samples.append(Sample(step, held(mark)))
    if process.returncode:
        raise RunError(f"the run ended with exit code {process.returncode}; its log: {log}")
    return samples


def steps_done(metrics: Path) -> int:
    """The last step with metrics; 0 before the first."""
    if not metrics.exists():
        return 0
    return max((json.loads(line)["step"] for line in metrics.read_text(encoding="utf-8").splitlines()), default=0)


def held(mark: str) -> dict[str, float]:
    """MiB by kind of process; one that ends meanwhile is left out."""
    found: dict[str, float] = {}
    for folder, kind in processes(mark):
        try:
            share = (folder / "smaps_rollup").read_text(encoding="ascii")
        except OSError:
            continue
        found[kind] = found.get(kind, 0.0) + int(share.split("\nPss:")[1].split()[0]) / 1024
    return found


def summary(samples: Sequence[Sample], steps: int) -> dict[str, Any]:
    """Medians around step 50 and over the last steps, of each kind and of all, and how much they grew.

    Each median is over a sixth of the steps: checkpoints and evaluations come and go. Raises `RunError` where there
    are no samples of either.
    """
    span = (steps - SETTLED_STEP) // 6 or 1
    begin = [s for s in samples if SETTLED_STEP <= s.step <= SETTLED_STEP + span]
    end = [s for s in samples if s.step > steps - span]
    if not begin or not end:
        raise RunError(f"no samples around step {SETTLED_STEP} or at the end: the run was over in a few seconds")
    kinds = sorted({kind for sample in (*begin, *end) for kind in sample.mib})
    middle = {
        kind: tuple(statistics.median(s.mib.get(kind, 0.0) for s in part) for part in (begin, end)) for kind in kinds
    }
    total = tuple(statistics.median(sum(s.mib.values()) for s in part) for part in (begin, end))
    growth = total[1] / total[0] - 1
    return {
        "steps": steps,
        "mib": {kind: {"settled": first, "end": last} for kind, (first, last) in (*middle.items(), ("all", total))},
        "growth": growth,
        "reached": {"growth": growth <= TARGET_GROWTH},
        "samples": [{"step": s.step, "mib": dict(s.mib)} for s in samples],
    }


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    lines = [
        "MiB".ljust(28) + f"step {SETTLED_STEP}".rjust(12) + f"step {result['steps']}".rjust(12) + "growth".rjust(10)
    ]
    for kind, found in result["mib"].items():
        first, last = found["settled"], found["end"]
        growth = f"{last / first - 1:10.1%}" if first else "-".rjust(10)
        lines.append(kind.ljust(28) + f"{first:12.0f}{last:12.0f}" + growth)
    lines.append(f"growth after step {SETTLED_STEP}: {result['growth']:.1%} (at most {TARGET_GROWTH:.0%} asked)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
