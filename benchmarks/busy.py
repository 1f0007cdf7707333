"""`rlhf-dist bench busy`: what one other busy process on the machine costs a step of `rlhf-dist train`.

Threads of OpenMP that wait for each other spin for a while before they sleep; a core that spins for a thread that has
none does nothing for anybody. How long they spin is ours to set (`cluster/spec.py`). Quiet and busy runs take turns.
With `--settings`, the limit's two halves (`_limit.py`) are measured under other settings too, which is what ours was
chosen by.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from _arguments import canonical_arguments
from _canonical import canonical_config, write_config
from step import HERE, PHASES, Step, machine_facts, run_limit, run_ours, run_process, save, work_folder

SHOWN = ("generate", "train", "step")
TARGET_RATIO = 2.0
"""At most; a step beside one busy process over a quiet one."""
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "OpenMP's own": {},
    "spin 10000": {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"},
    "spin 2000": {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "1"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""PyTorch's wheels bring GNU OpenMP, which counts spins; Intel's, where it is loaded, counts milliseconds."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    found: dict[str, dict[str, list[Step]]] = {}
    with work_folder() as folder:
        config = canonical_config(folder, "grpo", args.words, args.warmup + args.steps)
        path = write_config(config, folder)
        run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})

        def measure(name: str) -> list[Step]:
            if name == "rlhf-dist":
                label = f"run-{len(list(folder.glob('run-*.log')))}"
                return run_ours(path, folder, label, PHASES["grpo"])[0]
            return run_limit(config, folder, SETTINGS[name])

        for number in range(args.runs):
            for name in ("rlhf-dist", *(SETTINGS if args.settings else ())):
                for state in ("quiet", "busy"):
                    print(f"round {number + 1} of {args.runs}: {name}, {state}", file=sys.stderr, flush=True)
                    with busy_process() if state == "busy" else nullcontext():
                        steps = measure(name)
                    found.setdefault(name, {}).setdefault(state, []).extend(steps[args.warmup :])
    result = summary(found)
    print(table(result))
    save(args.out, result | {"config": args.words, "warmup": args.warmup, "machine": machine_facts()})
    return 0


@contextmanager
def busy_process() -> Iterator[None]:
    """One process that computes all the time, as another user's would."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait(10)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "busy",
        "A step beside one busy process over a quiet one.",
        {
            "steps": (1, 5, "measured steps of each run"),
            "warmup": (0, 1, "steps before them that do not count"),
            "runs": (1, 1, "rounds of all"),
        },
        flag="settings: raw vLLM and PyTorch under other OpenMP settings too",
    )


def summary(found: Mapping[str, Mapping[str, Sequence[Step]]]) -> dict[str, Any]:
    """Milliseconds a response token, quiet and busy, of each side, by phase and in all; and busy over quiet.

    By token, since steps sample different numbers of them.
    """
    sides = {
        name: {state: {phase: cost(steps, phase) for phase in SHOWN} for state, steps in states.items()}
        for name, states in found.items()
    }
    ratios = {
        name: {phase: side["busy"][phase] / side["quiet"][phase] for phase in SHOWN} for name, side in sides.items()
    }
    return {"sides": sides, "ratios": ratios, "reached": {"ratio": ratios["rlhf-dist"]["step"] <= TARGET_RATIO}}


def cost(steps: Sequence[Step], phase: str) -> float:
    """Milliseconds a response token: the median step's."""
    return statistics.median(
        1000 * (sum(step.seconds.values()) if phase == "step" else step.seconds[phase]) / step.tokens for step in steps
    )


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    heads = [f"{phase} {state}" for phase in SHOWN for state in ("quiet", "busy", "ratio")]
    lines = ["ms a response token".ljust(20) + "".join(head.rjust(16) for head in heads)]
    for name, side in result["sides"].items():
        cells = [
            value
            for phase in SHOWN
            for value in (side["quiet"][phase], side["busy"][phase], result["ratios"][name][phase])
        ]
        lines.append(name.ljust(20) + "".join(f"{cell:16.2f}" for cell in cells))
    ratio = result["ratios"]["rlhf-dist"]["step"]
    lines.append(f"ratio = a step beside one busy process / a quiet one: {ratio:.2f} (at most {TARGET_RATIO:g} asked)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
