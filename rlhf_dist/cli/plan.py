"""`rlhf-dist plan`: what a training run would take; starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlhf_dist.cli import arguments


def run(argv: Sequence[str]) -> int:
    """Print the placement and the batch arithmetic of `train` on this machine, or on one of the given size."""
    parser = arguments.config_parser(
        "plan", "Who would get which CPUs and GPUs in `train`, and the arithmetic of the batches."
    )
    parser.add_argument(
        "--cpus", type=_count, help="CPUs of the machine or cluster to plan for; default: this machine's"
    )
    parser.add_argument(
        "--gpus", type=_count, help="GPUs of the machine or cluster to plan for; default: this machine's"
    )
    args = arguments.parse(parser, argv)
    config = arguments.load_checked(args.words, "plan", "train")
    from rlhf_dist.planning.placement import Machine, local_machine

    here = local_machine()
    machine = Machine(here.cpus if args.cpus is None else args.cpus, here.gpus if args.gpus is None else args.gpus)
    print("\n".join(arguments.plan_lines(config, machine, "train")))
    return 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)
