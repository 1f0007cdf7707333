"""`rlhf-dist bench peers`: a GRPO step of `rlhf-dist train` beside one of TRL's GRPOTrainer, on the canonical work.

Each trains the same random model on the same prompts with one optimizer step a batch, on all cores. Each samples its
own lengths, so they are compared by response tokens a second, as medians over steps. They take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from _arguments import canonical_arguments
from _canonical import canonical_config, write_config
from step import HERE, OPENMP, Step, machine_facts, run_ours, run_process, save, side_summary, work_folder

from rlhf_dist.errors import ConfigError

TARGET_RATIO = 5.0
"""At least; our response tokens a second over TRL's."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ConfigError("this benchmark needs TRL: launch/setup.sh --dev installs it") from None
    found: dict[str, list[Step]] = {"ours": [], "TRL": []}
    with work_folder() as folder:
        config = canonical_config(folder, "grpo", args.words, args.warmup + args.steps)
        path = write_config(config, folder)
        run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})
        for number in range(args.runs):
            print(f"round {number + 1} of {args.runs}: ours", file=sys.stderr, flush=True)
            steps, _ = run_ours(path, folder, f"ours-{number}", ("generate", "train", "sync", "other"))
            found["ours"] += steps[args.warmup :]
            print(f"round {number + 1} of {args.runs}: TRL", file=sys.stderr, flush=True)
            found["TRL"] += run_trl(path, folder, number)[args.warmup :]
    result = summary(found)
    print(table(result, version))
    save(args.out, result | {"trl": version, "config": args.words, "warmup": args.warmup, "machine": machine_facts()})
    return 0


def run_trl(config: Path, folder: Path, number: int) -> list[Step]:
    """Every step of one run of TRL. Raises `RunError`."""
    timings = folder / f"trl-{number}.json"
    run_process(
        [sys.executable, str(HERE / "_trl_side.py"), str(config), str(timings)], timings.with_suffix(".log"), OPENMP
    )
    return [Step({"step": row["seconds"]}, row["tokens"]) for row in json.loads(timings.read_text(encoding="utf-8"))]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "peers",
        "A GRPO step beside one of TRL's GRPOTrainer, by response tokens a second.",
        {
            "steps": (1, 4, "measured steps of each run"),
            "warmup": (0, 1, "steps before them that do not count"),
            "runs": (1, 2, "rounds of both"),
        },
    )


def summary(found: Mapping[str, Sequence[Step]]) -> dict[str, Any]:
    """Medians of both and the ratio of their tokens a second."""
    sides = {name: side_summary(steps) for name, steps in found.items()}
    ratio = sides["ours"]["tokens_per_s"] / sides["TRL"]["tokens_per_s"]
    return {"sides": sides, "ratio": ratio, "reached": {"ratio": ratio >= TARGET_RATIO}}


def table(result: Mapping[str, Any], version: str) -> str:
    """What the command prints."""
    names = {"ours": "rlhf-dist", "TRL": f"TRL {version}"}
    lines = ["medians".ljust(14) + "step s".rjust(10) + "tokens".rjust(10) + "response tok/s".rjust(17)]
    for name, side in result["sides"].items():
        row = f"{side['step_s']:10.2f}{side['tokens']:10.0f}{side['tokens_per_s']:17.0f}"
        lines.append(names[name].ljust(14) + row)
    lines.append(
        f"ratio = ours / TRL's in response tokens a second: {result['ratio']:.1f} (at least {TARGET_RATIO:g} asked)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
