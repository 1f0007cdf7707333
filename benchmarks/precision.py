"""`rlhf-dist bench precision`: a bfloat16 step of `rlhf-dist train` beside a float32 one, and the same of the limit.

Both are ordinary runs on the canonical work; the limit (`_limit.py`) shows what vLLM and PyTorch alone gain. What is
sampled differs between the types, so they are compared by response tokens a second, as medians over steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _arguments import canonical_arguments
from _canonical import canonical_config, write_config
from step import (
    HERE,
    PHASES,
    Step,
    machine_facts,
    run_limit,
    run_ours,
    run_process,
    save,
    side_summary,
    work_folder,
)

from rlhf_dist.config.schema import Config

DTYPES: Mapping[str, Sequence[str]] = {
    "float32": ("model.dtype=float32",),
    # DeepSpeed adds bfloat16 gradients up in float32 from stage 1 on.
    "bfloat16": ("model.dtype=bfloat16", "learner.zero_stage=1"),
}
"""Type -> what it sets."""
TARGET_RATIO = 1.8
"""At least; tokens a second of our bfloat16 run over those of our float32 one."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    found: dict[str, dict[str, list[Step]]] = {side: {dtype: [] for dtype in DTYPES} for side in ("limit", "ours")}
    with work_folder() as folder:
        configs = {dtype: made(folder / dtype, dtype, args) for dtype in DTYPES}
        for number in range(args.runs):
            for dtype, config in configs.items():
                path = Path(config.output) / "config.yaml"
                print(f"round {number + 1} of {args.runs}: {dtype}", file=sys.stderr, flush=True)
                steps, _ = run_ours(path, path.parent, f"ours-{number}", PHASES["grpo"])
                found["ours"][dtype] += steps[args.warmup :]
                found["limit"][dtype] += run_limit(config, path.parent)[args.warmup :]
    result = summary(found)
    print(table(result))
    save(args.out, result | {"config": args.words, "warmup": args.warmup, "machine": machine_facts()})
    return 0


def made(folder: Path, dtype: str, args: argparse.Namespace) -> Config:
    """The canonical config of this type, with its model, in a folder of its own. Raises `ConfigError`."""
    folder.mkdir()
    config = canonical_config(folder, "grpo", [*args.words, *DTYPES[dtype]], args.warmup + args.steps)
    path = write_config(config, folder)
    run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})
    return config


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "precision",
        "A bfloat16 step beside a float32 one, by response tokens a second.",
        {
            "steps": (1, 6, "measured steps of each run"),
            "warmup": (0, 2, "steps before them that do not count"),
            "runs": (1, 1, "rounds of all"),
        },
        own={
            "model.dtype": "take it out; both types are measured",
            "learner.zero_stage": "take it out; the type decides",
        },
    )


def summary(found: Mapping[str, Mapping[str, Sequence[Step]]]) -> dict[str, Any]:
    """Medians of every side and type; what bfloat16 gains on each side."""
    sides = {side: {dtype: side_summary(steps) for dtype, steps in of_type.items()} for side, of_type in found.items()}
    gains = {
        side: of_type["bfloat16"]["tokens_per_s"] / of_type["float32"]["tokens_per_s"]
        for side, of_type in sides.items()
    }
    return {"sides": sides, "gains": gains, "reached": {"ratio": gains["ours"] >= TARGET_RATIO}}


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    lines = [
        "medians".ljust(18) + "".join(h.rjust(10) for h in ("step s", "generate", "train")) + "response tok/s".rjust(17)
    ]
    for side, of_type in result["sides"].items():
        for dtype, found in of_type.items():
            seconds = found["seconds"]
            row = "".join(f"{cell:10.2f}" for cell in (found["step_s"], seconds["generate"], seconds["train"]))
            lines.append(f"{side} {dtype}".ljust(18) + row + f"{found['tokens_per_s']:17.0f}")
    gains = result["gains"]
    lines.append(
        f"ratio = bfloat16 / float32 in response tokens a second: ours {gains['ours']:.2f} (at least "
        f"{TARGET_RATIO:g} asked), the limit's own {gains['limit']:.2f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
