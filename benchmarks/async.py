"""`rlhf-dist bench async`: generation and learning at once, beside each in turn, one core for each half in both.

Ours against ours: the same canonical run of `rlhf-dist train` with `loop.max_policy_lag` 0 and above it, both with
`cluster.colocate: false`. The default run, whose halves take turns on all cores, is shown beside them and not judged.
The runs take turns, because machines are noisy, and are compared by response tokens a second over all measured steps:
single steps of an asynchronous run are long and short by chance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from _arguments import BOTH_HALVES, canonical_arguments
from _canonical import canonical_config, write_config
from step import HERE, Step, machine_facts, run_ours, run_process, save, work_folder

APART = ("cluster.colocate=false",)
PHASES = ("generate", "train", "sync", "other")
TARGET_RATIO = 1.6
"""At least; asynchronous over synchronous, in response tokens a second."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    sides = {
        "in turn": APART,
        "at once": (*APART, f"loop.max_policy_lag={args.lag}", "algo.ratio_to=behaviour"),
        "default": (),
    }
    found: dict[str, list[list[Step]]] = {name: [] for name in sides}
    with work_folder() as folder:
        count = args.warmup + args.steps + args.lag
        configs = {name: canonical_config(folder, "grpo", [*args.words, *sides[name]], count) for name in sides}
        for number in range(args.runs):
            for name, config in configs.items():
                print(f"round {number + 1} of {args.runs}: {name}", file=sys.stderr, flush=True)
                path = write_config(config, folder)
                if not (folder / "model").exists():
                    run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})
                steps, _ = run_ours(path, folder, f"{name.replace(' ', '-')}-{number}", PHASES)
                # At the end of a run nothing more is sampled, and the learner has the machine to itself.
                found[name].append(steps[args.warmup : args.warmup + args.steps])
    result = summary(found)
    print(table(result))
    facts = {"lag": args.lag, "config": args.words, "warmup": args.warmup, "machine": machine_facts()}
    save(args.out, result | facts)
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "async",
        "Generation and learning at once beside each in turn, by response tokens a second.",
        {
            "lag": (1, 1, "loop.max_policy_lag"),
            "steps": (1, 8, "measured steps of each run"),
            "warmup": (0, 2, "steps before them that do not count"),
            "runs": (1, 2, "rounds of all runs"),
        },
        own=BOTH_HALVES,
    )


def summary(found: Mapping[str, Sequence[Sequence[Step]]]) -> dict[str, Any]:
    """Of each side the median over its runs; the ratios of tokens a second."""
    sides = {name: side_summary(runs) for name, runs in found.items()}
    ratio = sides["at once"]["tokens_per_s"] / sides["in turn"]["tokens_per_s"]
    return {
        "sides": sides,
        "ratio": ratio,
        "to_default": sides["at once"]["tokens_per_s"] / sides["default"]["tokens_per_s"],
        "reached": {"ratio": ratio >= TARGET_RATIO},
    }


def side_summary(runs: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """Tokens a second of a run: all tokens of its steps over all their time; of the phases the mean of a step."""
    rates = [sum(step.tokens for step in run) / sum(sum(step.seconds.values()) for step in run) for run in runs]
    steps = [step for run in runs for step in run]
    return {
        "tokens_per_s": statistics.median(rates),
        "runs": rates,
        "seconds": {phase: statistics.fmean(step.seconds[phase] for step in steps) for phase in PHASES},
        "tokens": statistics.fmean(step.tokens for step in steps),
    }


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    heads = ("step s", *PHASES)
    lines = ["means".ljust(10) + "".join(name.rjust(10) for name in heads) + "response tok/s".rjust(17)]
    for name, side in result["sides"].items():
        seconds = side["seconds"]
        cells = [sum(seconds.values()), *(seconds[phase] for phase in PHASES)]
        row = "".join(f"{cell:10.2f}" for cell in cells)
        lines.append(name.ljust(10) + row + f"{side['tokens_per_s']:17.0f}")
    lines.append("generate of `at once` is what the learner waits for; the rest of the sampling goes on beside it")
    lines.append(
        f"ratio = at once / in turn in response tokens a second: {result['ratio']:.2f} (at least {TARGET_RATIO:g} "
        f"asked); to the default run with all cores for each half in turn: {result['to_default']:.2f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
