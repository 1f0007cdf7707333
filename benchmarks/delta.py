"""`rlhf-dist bench delta`: a push by changed words beside a whole one, over learning rates, in bfloat16.

A small model is trained for real, with one optimizer step a push. The other node is this machine, over loopback: what
it saves on a slower network is its share of the bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from _arguments import canonical_arguments
from _canonical import canonical_config, write_config
from step import HERE, OPENMP, machine_facts, run_process, save, work_folder

WORD_BYTES = 2
SETS = ("model.dtype=bfloat16", "learner.zero_stage=1", "learner.delta_push=true", "cluster.colocate=false")
ASKED_RATE = "1e-06"
TARGET_SHARE = 0.1
"""At most; bytes of a push at that learning rate over those of the whole."""


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, save the JSON; returns 0 also where the target is missed. Raises `RlhfError`."""
    args = parse(argv)
    with work_folder() as folder:
        path = write_config(canonical_config(folder, "grpo", [*args.words, *SETS], 1), folder)
        run_process([sys.executable, str(HERE / "_canonical.py"), str(path)], folder / "models.log", {})
        log, words = folder / "delta.log", [HERE / "_delta_side.py", path, args.train, args.warmup, args.steps]
        run_process([sys.executable, *map(str, words)], log, OPENMP)
        found: dict[str, Any] = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    result = summary(found)
    print(table(result))
    save(args.out, result | {"config": args.words, "machine": machine_facts()})
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises `InputError`."""
    return canonical_arguments(
        argv,
        "delta",
        "A push by changed words beside a whole one, over learning rates.",
        {
            "train": (1, 80, "steps that shape the model first"),
            "warmup": (0, 20, "steps at each rate that do not count"),
            "steps": (1, 5, "measured steps at each rate"),
        },
        own={word.partition("=")[0]: "take it out" for word in SETS},
    )


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Shares of the whole, by rate; what was asked."""
    words = found["parameters"]
    rates = {
        rate: one | {"changed": one["words"] / words, "share": one["bytes"] / (WORD_BYTES * words)}
        for rate, one in found["rates"].items()
    }
    reached = {"bytes": rates[ASKED_RATE]["share"] <= TARGET_SHARE}
    return {**found, "rates": rates, "reached": reached}


def table(result: Mapping[str, Any]) -> str:
    """What the command prints."""
    losses = result["losses"]
    heads = ("changed", "bytes", "mark ms", "publish ms", "send ms", "whole: publish", "send", "step ms", "loss")
    lines = [
        f"{result['parameters'] / 1e6:.1f}M parameters in bfloat16, {result['threads']} threads; loss "
        f"{losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps before",
        "rate".ljust(8) + "".join(f"{name:>15}" for name in heads),
    ]
    for rate, one in result["rates"].items():
        cells = [f"{one['changed']:.2%}", f"{one['share']:.3f}"]
        names = ("mark_s", "publish_s", "send_s", "whole_publish_s", "whole_send_s", "step_s")
        cells += [f"{1e3 * one[name]:.1f}" for name in names]
        lines.append(rate.ljust(8) + "".join(f"{cell:>15}" for cell in [*cells, f"{one['loss']:.3f}"]))
    share = result["rates"][ASKED_RATE]["share"]
    lines += [
        "bytes: of the push, over those of the whole; above a quarter of the words the whole is sent",
        f"at learning rate {ASKED_RATE} {share:.3f} of the bytes (at most {TARGET_SHARE:g} asked)",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
